"""What the engine tells about its requests, and what scoring asks."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from cluster.errors import RequestError
from cluster.params import check_int
from cluster.sequence import FinishReason, ScoreSpec, Timings
from worker.protocol import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRows:
    """Consecutive logit rows of one scored request; row t is what the model says after token t."""

    index: int  # of the request in its call of score
    start: int  # position of the first row
    num_rows: int
    logits: bytes  # float32 [num_rows, vocab], native order
    num_mtp_rows: int = 0  # num_rows, or one less at the end: the last row has no next token
    mtp_logits: bytes = b""  # float32 [num_mtp_rows, vocab]
    finished: bool = False  # the request's last rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """News of one request. Its last event, and only that, has a ``finish_reason``."""

    request_id: int
    index: int = 0  # of the request in its call of generate or score
    text: str = ""  # new text; empty without a tokenizer
    token_ids: list[int] = field(default_factory=list)  # new output tokens
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the next prompt tokens
    finish_reason: FinishReason | None = None
    error: str = ""  # with finish_reason error: what happened
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # so far
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    timings: Timings | None = None  # in the last event
    score: ScoreRows | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last event."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Token ids whose logits are wanted, teacher-forced.

    With ``decode_from`` K, rows 0 .. K-1 come from prefill and each later token goes through the
    decode path alone.
    """

    token_ids: SequenceOf[int]
    decode_from: int | None = None
    mtp: bool = False

    def spec(self) -> ScoreSpec:
        """The checked choice; RequestError if ``decode_from`` does not fit the length."""
        if self.decode_from is not None:
            if len(self.token_ids) < 2:
                raise RequestError("decode_from needs a request of 2 tokens at least")
            check_int("decode_from", self.decode_from, 1, len(self.token_ids) - 1)
        return ScoreSpec(decode_from=self.decode_from, mtp=self.mtp)
