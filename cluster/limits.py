"""The sizes that bound every plan, from the config and from what the ranks allocated."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import RequestError
from worker.config import WorkerConfig
from worker.protocol import CacheInfo

LOGIT_BYTES = 256 << 20  # of the scoring rows that one step may return


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a step and a request may use."""

    num_blocks: int
    block_size: int
    num_shards: int  # of the KV blocks
    num_tails: int
    num_slots: int
    max_model_len: int
    max_batched_tokens: int
    num_drafts: int
    tail_interval: int  # blocks
    prefix_cache: bool
    vocab_size: int

    @classmethod
    def build(cls, config: WorkerConfig, info: CacheInfo, vocab_size: int) -> SchedulerLimits:
        """What the config asks for, within what the ranks allocated."""
        parallel = config.parallel
        return cls(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            num_shards=parallel.cp if parallel.kv_shard == "cp" else 1,
            num_tails=info.num_tails,
            num_slots=min(info.num_slots, config.scheduler.max_num_seqs),
            max_model_len=info.max_model_len,
            max_batched_tokens=config.scheduler.max_batched_tokens,
            num_drafts=config.speculative.mtp,
            tail_interval=config.kv_cache.tail_interval,
            prefix_cache=config.scheduler.prefix_cache and info.num_tails > 0,
            vocab_size=vocab_size,
        )

    @property
    def max_request_tokens(self) -> int:
        """Tokens of prompt and output that one request can have."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def max_logit_rows(self) -> int:
        """Logit rows of one step, MTP rows counted too; 2 at least, so that scoring advances."""
        return max(2, LOGIT_BYTES // (4 * self.vocab_size))

    def check_fits(self, num_tokens: int) -> None:
        """RequestError if a request of ``num_tokens`` (prompt and output) could never run."""
        if num_tokens > self.max_model_len:
            raise RequestError(
                f"the request needs {num_tokens} tokens (prompt and output); "
                f"max_model_len is {self.max_model_len}"
            )
        need = self.num_blocks_for(num_tokens)
        if need > self.num_blocks:
            raise RequestError(
                f"the request needs {need} KV blocks of {self.block_size} tokens "
                f"({num_tokens} tokens); the cache has {self.num_blocks}"
            )

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)
