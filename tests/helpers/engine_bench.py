"""An engine on mock ranks, and what its requests should bring."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.engine import EngineConfig, LLMEngine
from cluster.events import RequestEvent
from cluster.params import GenerationParams
from cluster.tokenizer import Tokenizer
from model.parallel.config import ParallelConfig
from tests.helpers.byte_tokenizer import byte_tokenizer_json
from tests.helpers.mock_executor import MockExecutor, reference
from worker.config import KVCacheConfig, SchedulerConfig, SpeculativeConfig, WorkerConfig
from worker.protocol import SamplingParams

VOCAB = 97
EOS = 1
TOKENIZER = Tokenizer(byte_tokenizer_json())


class Clock:
    """Advances by a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def build(
    *,
    tokenizer: Tokenizer | None = None,
    max_batched_tokens: int = 64,
    max_num_seqs: int = 8,
    prefix_cache: bool = True,
    tail_interval: int = 2,
    max_rebuilds: int = 3,
    vocab: int = VOCAB,
    **ranks: int,
) -> tuple[LLMEngine, MockExecutor]:
    """A started engine and its mock ranks, which check who owns the blocks they write."""
    executor = MockExecutor(vocab=vocab, max_batched_tokens=max_batched_tokens, **ranks)
    shards = executor.num_shards
    worker = WorkerConfig(
        parallel=ParallelConfig(cp=shards, kv_shard="cp" if shards > 1 else "replicate"),
        kv_cache=KVCacheConfig(tail_interval=tail_interval),
        scheduler=SchedulerConfig(
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
            prefix_cache=prefix_cache,
        ),
        speculative=SpeculativeConfig(mtp=executor.mtp),
    )
    config = EngineConfig(
        worker=worker, vocab_size=vocab, eos_token_ids=(EOS,), max_rebuilds=max_rebuilds, seed=3
    )
    engine = LLMEngine(config, executor, tokenizer, clock=Clock())
    engine.start()
    executor.ref_count = lambda block: engine.scheduler.placement.blocks.ref_count(block)
    return engine, executor


def expected(prompt: list[int], params: GenerationParams, vocab: int = VOCAB) -> list[int]:
    """The tokens that the mock ranks give a request, whatever runs beside it."""
    stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
    return reference(
        prompt,
        SamplingParams(
            temperature=params.temperature,
            seed=params.seed or 0,
            presence_penalty=params.presence_penalty,
        ),
        max_tokens=params.max_tokens or 10**9,
        min_tokens=params.min_tokens,
        vocab=vocab,
        stop=stop,
    )


def assert_clean(engine: LLMEngine) -> None:
    """Nothing runs, and every slot, block and tail is free."""
    scheduler = engine.scheduler
    assert scheduler.placement.blocks.num_free == scheduler.limits.num_blocks
    assert scheduler.placement.num_free_slots == scheduler.limits.num_slots
    assert scheduler.placement.blocks.tails.num_pinned == 0
    assert scheduler.placement.blocks.tails.num_taken == 0
    assert not scheduler.sequences
    assert not engine.has_work


def collect(events: Iterator[RequestEvent], count: int) -> list[list[int]]:
    """Tokens by request; each ends once, and says nothing behind its end."""
    out: list[list[int]] = [[] for _ in range(count)]
    ends = [0] * count
    for event in events:
        assert not ends[event.index], "news after the end"
        out[event.index] += event.token_ids
        ends[event.index] += event.finished
    assert ends == [1] * count
    return out
