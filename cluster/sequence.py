"""A request as the user gave it, and the sequence it becomes while it is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from cluster.block_manager import extend_chain
from worker.protocol import SamplingParams, TokenLogprobs


class SequenceStatus(Enum):
    """Where a sequence is. WAITING holds nothing on the ranks; PREFILL and DECODE hold a slot."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a sequence ended: exactly one per accepted request."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    """Teacher forcing: tokens before ``decode_from`` are prefilled, later ones decoded one by one."""

    decode_from: int | None = None  # None: everything is prefilled
    mtp: bool = False  # also the MTP logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request; nothing in it changes any more."""

    request_id: int  # made by the engine, increasing
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 0  # output tokens at most; 0 only for scoring
    min_tokens: int = 0  # stop tokens and strings before this many output tokens do not end it
    ignore_eos: bool = False
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    salt: bytes = b""  # requests share cached prefixes only with requests of the same salt
    score: ScoreSpec | None = None

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output together at most."""
        return len(self.prompt_ids) + self.max_tokens

    def stops_at(self, token_id: int) -> bool:
        """Whether ``token_id`` ends the output."""
        if token_id in self.stop_token_ids:
            return True
        return not self.ignore_eos and token_id in self.eos_token_ids


@dataclass(slots=True, kw_only=True)
class Timings:
    """Seconds of one monotonic clock; 0.0 until it happened."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def queue_s(self) -> float:
        """From arrival to the first step that worked on the request."""
        return max(0.0, self.scheduled - self.arrival)

    @property
    def ttft_s(self) -> float:
        """From arrival to the first output token."""
        return max(0.0, self.first_token - self.arrival)

    @property
    def e2e_s(self) -> float:
        """From arrival to the end."""
        return max(0.0, self.finished - self.arrival)


class Sequence:
    """What the scheduler knows about a request that is served: tokens, blocks, slot, progress."""

    __slots__ = (
        "block_ids",
        "cached_tokens",
        "chain",
        "crossed",
        "finish_reason",
        "num_blocks_sent",
        "num_computed",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_published",
        "request",
        "restored_tail",
        "slot",
        "status",
        "timings",
        "token_ids",
    )

    def __init__(self, request: Request, arrival: float = 0.0) -> None:
        self.request = request
        self.token_ids: list[int] = list(request.prompt_ids)  # prompt, then output
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.timings = Timings(arrival=arrival)
        self.chain: list[bytes] = []  # hashes of the full blocks of token_ids, as far as needed
        self.cached_tokens = -1  # prompt tokens found in the prefix cache; -1: not started yet
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0  # already handed out
        self.clear_placement()

    def clear_placement(self) -> None:
        """Forget what the ranks hold; the tokens stay."""
        self.slot = -1
        self.block_ids: list[int] = []
        self.num_blocks_sent = 0  # of block_ids, already in the ranks' block table
        self.num_published = 0  # of block_ids, already offered to the prefix cache
        self.num_computed = 0  # tokens whose state is on the ranks
        self.restored_tail = -1  # pinned until the step with the SlotInit is done
        self.crossed = -1  # block boundary that the last decode step reached or passed

    @property
    def request_id(self) -> int:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the user's prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """Output tokens so far."""
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def prefill_target(self) -> int:
        """Tokens that prefill computes before decode (or, for scoring, the end) comes."""
        score = self.request.score
        if score is not None and score.decode_from is not None:
            return score.decode_from
        return len(self.token_ids)

    @property
    def logit_rows(self) -> int:
        """Logit rows that each token returns: 0 unless scored, 2 with the MTP logits."""
        score = self.request.score
        return 0 if score is None else 1 + score.mtp

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.status is SequenceStatus.FINISHED

    def boundary_key(self, position: int, block_size: int) -> bytes:
        """Chain hash of the tokens before ``position``, a positive multiple of ``block_size``."""
        self.extend_chain(position, block_size)
        return self.chain[position // block_size - 1]

    def extend_chain(self, num_tokens: int, block_size: int) -> None:
        """Hash the full blocks of the first ``num_tokens`` tokens."""
        extend_chain(self.chain, self.token_ids, num_tokens, block_size, self.request.salt)

    def append_tokens(self, token_ids: list[int]) -> int:
        """Append output tokens up to the first that ends the output; how many were taken.

        Sets ``finish_reason`` when one did.
        """
        request = self.request
        for taken, token_id in enumerate(token_ids, start=1):
            self.token_ids.append(token_id)
            if self.num_output_tokens >= request.min_tokens and request.stops_at(token_id):
                self.finish_reason = FinishReason.STOP
                return taken
            if self.num_output_tokens >= request.max_tokens:
                self.finish_reason = FinishReason.LENGTH
                return taken
        return len(token_ids)

    def take_prompt_logprobs(
        self, start: int, logprobs: list[TokenLogprobs]
    ) -> list[TokenLogprobs]:
        """Of the logprobs of tokens ``start + 1 ..`` those of the prompt not handed out before.

        A request that was preempted computes its prompt again and would report it twice.
        """
        if self.request.sampling.prompt_logprobs < 0:
            return []
        first = self.num_prompt_logprobs + 1
        fresh = (
            logprobs[first - start - 1 : self.num_prompt_tokens - start - 1]
            if first > start
            else []
        )
        self.num_prompt_logprobs += len(fresh)
        return fresh
