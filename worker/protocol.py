"""What crosses the line between the engine and the ranks each step: typed, tensor-free messages.

A step has one phase. Positions are absolute token positions, ``end`` is exclusive. A *slot* is a row
in the ranks' per-request state (window rings, compressor states); a *tail* is a saved copy of that
state at a block boundary. Block ids are global; see ``model.parallel.config`` for their owners.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are drawn. Ranges are checked by the engine before a step is built."""

    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # with the output position, the only source of the random numbers
    logprobs: int = -1  # -1 off, n: the chosen token's and the n best
    prompt_logprobs: int = -1

    @property
    def filters(self) -> bool:
        """Whether tokens are left out by comparing them with the rest of the row."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def needs_history(self) -> bool:
        """Whether the ranks must know the tokens before ``SlotInit.start``."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


class TailSave(msgspec.Struct, frozen=True, kw_only=True):
    """Copy the state as of ``position`` (a block boundary) into tail ``tail``."""

    position: int
    tail: int


class SlotInit(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes over a slot; its old contents must never be seen again."""

    request_id: int
    slot: int
    sampling: SamplingParams
    num_prompt_tokens: int  # tokens at or after this position are output (penalties, seeds)
    start: int = 0  # first position that will be computed
    restore_tail: int = -1  # tail saved at position ``start``; -1 for none
    block_ids: list[int] = []  # blocks of a prefix hit: positions 0 .. start
    history: list[int] = []  # tokens 0..start-1, only when sampling.needs_history


class PrefillSlice(msgspec.Struct, frozen=True, kw_only=True):
    """One request's chunk in a prefill step."""

    request_id: int
    slot: int
    start: int
    token_ids: list[int]
    next_token: int = -1  # the token after the chunk, -1 when not known yet
    block_ids: list[int] = []  # blocks newly appended to the request's block table
    save_tails: list[TailSave] = []  # positions in start+1 .. end
    sample: bool = False  # the chunk ends the prompt: draw a token
    logits: bool = False  # return the logits of every row (score)
    mtp_logits: bool = False  # return the MTP logits of every row whose next token is known


class DecodeSlice(msgspec.Struct, frozen=True, kw_only=True):
    """One request's rows in a decode step: its last token and the drafts after it.

    The ranks hold both; ``token_ids`` overrides them (teacher forcing).
    """

    request_id: int
    slot: int
    position: int  # of the first row
    num_tokens: int  # 1 + drafts to verify
    token_ids: list[int] = []
    next_token: int = -1  # with mtp_logits: the token after the last row
    block_ids: list[int] = []
    logits: bool = False
    mtp_logits: bool = False


class TailOp(msgspec.Struct, frozen=True, kw_only=True):
    """Save a slot's state at ``position`` before the step runs (after decode crossed a boundary)."""

    slot: int
    position: int
    tail: int


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step, the same message for every rank. Order: saves, inits, then the phase's slices."""

    step_id: int
    phase: Literal["prefill", "decode"]
    saves: list[TailOp] = []
    inits: list[SlotInit] = []
    prefill: list[PrefillSlice] = []
    decode: list[DecodeSlice] = []


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probability of one token and of the best ones (raw logits, before temperature)."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: list[tuple[int, float]] = []


class SliceOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one slice produced."""

    request_id: int
    token_ids: list[int] = []  # new tokens: accepted drafts and the one after them
    num_drafts: int = 0  # drafts verified in this step
    num_accepted: int = 0
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []  # of tokens start+1 .. end (those known)
    logits: bytes = b""  # float32 [rows, vocab], row-major
    mtp_logits: bytes = b""  # float32 [rows with a known next token, vocab]


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A step's result; rank 0 fills ``outputs``, the other ranks only acknowledge."""

    step_id: int
    rank: int
    outputs: list[SliceOutput] = []
    seconds: float = 0.0


class CacheInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank allocated, for the start-up report and the block manager."""

    num_blocks: int  # logical blocks of the whole world (kv_shard: cp spreads their main pages)
    block_size: int
    num_slots: int
    num_tails: int
    max_model_len: int
    allocated_bytes: int
    weight_bytes: int
