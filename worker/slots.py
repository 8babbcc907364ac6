"""Host-side state of the requests that hold a slot: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from worker.protocol import SamplingParams, SlotInit
from worker.sampler import TokenHistory
from worker.sampling import DrawJob


@dataclass(slots=True, kw_only=True)
class Slot:
    """One running request.

    Args:
        request_id: the engine's number.
        sampling: how its tokens are drawn.
        num_prompt_tokens: tokens from here on are output.
        num_computed: tokens whose state is in the caches (accepted ones only).
        last_token: the newest token, not computed yet; -1 in the middle of a prompt.
        drafts: proposed tokens after ``last_token``.
        history: token counts for penalties, None when the request has none.
        resume_tail: tail to resume the MTP block from at the next prefill slice; -1 for none.
    """

    request_id: int
    sampling: SamplingParams
    num_prompt_tokens: int
    num_computed: int
    last_token: int = -1
    drafts: list[int] = field(default_factory=list)
    history: TokenHistory | None = None
    resume_tail: int = -1

    def observe(self, tokens: Sequence[int], position: int) -> None:
        """Count given tokens at ``position`` .. for the penalties."""
        if self.history is None:
            return
        split = max(self.num_prompt_tokens - position, 0)
        self.history.prompt.extend(tokens[:split])
        self.history.output.extend(tokens[split:])

    def advance(self, tokens: Sequence[int], position: int) -> None:
        """Rows ``position`` .. are computed and gave these new tokens."""
        self.num_computed = position + len(tokens)
        self.last_token = tokens[-1]
        self.drafts = []
        if self.history is not None:
            self.history.output.extend(tokens)

    def draw_job(self, position: int, unconfirmed: Sequence[int]) -> DrawJob:
        """How to draw the token at ``position``, after drafts that the history does not hold yet."""
        history = self.history
        if history is not None and unconfirmed:
            history = history.with_output(unconfirmed)
        return DrawJob(self.sampling, position - self.num_prompt_tokens, history)


class SlotTable:
    """Slots and their block tables, int32 [num_slots, max_blocks], -1 = no block yet."""

    def __init__(self, num_slots: int, max_blocks: int, cp: int, cp_rank: int, sharded: bool):
        self.slots: list[Slot | None] = [None] * num_slots
        self.block_table = np.full((num_slots, max_blocks), -1, dtype=np.int32)
        self.num_blocks = [0] * num_slots
        self.cp, self.cp_rank, self.sharded = cp, cp_rank, sharded

    def open(self, init: SlotInit) -> Slot:
        """Give a slot to a request; everything of the last one is forgotten."""
        history = None
        if init.sampling.needs_history:
            history = TokenHistory(
                prompt=init.history[: init.num_prompt_tokens],
                output=init.history[init.num_prompt_tokens :],
            )
        slot = Slot(
            request_id=init.request_id,
            sampling=init.sampling,
            num_prompt_tokens=init.num_prompt_tokens,
            num_computed=init.start,
            history=history,
            resume_tail=init.restore_tail,
        )
        self.slots[init.slot] = slot
        self.block_table[init.slot] = -1
        self.num_blocks[init.slot] = 0
        self.append_blocks(init.slot, init.block_ids)
        return slot

    def clear(self) -> None:
        """Give every slot back."""
        self.slots = [None] * len(self.slots)
        self.block_table[:] = -1
        self.num_blocks = [0] * len(self.num_blocks)

    def get(self, index: int, request_id: int) -> Slot:
        """The slot's request; RuntimeError when the engine and the ranks disagree about it."""
        slot = self.slots[index]
        if slot is None or slot.request_id != request_id:
            held = "nobody" if slot is None else f"request {slot.request_id}"
            raise RuntimeError(f"slot {index} is held by {held}, not by request {request_id}")
        return slot

    def append_blocks(self, index: int, block_ids: list[int]) -> None:
        """Extend a slot's block table."""
        first = self.num_blocks[index]
        self.block_table[index, first : first + len(block_ids)] = block_ids
        self.num_blocks[index] = first + len(block_ids)

    def tables(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(logical blocks, local main pages or -1), int32 [S, B], B = the most blocks any has."""
        width = max((self.num_blocks[i] for i in indices), default=0)
        table = self.block_table[indices, : max(width, 1)]
        return table, self.local_pages(table)

    def local_pages(self, blocks: np.ndarray) -> np.ndarray:
        """Local main page of each block id; -1 where it lives on another cp rank."""
        if not self.sharded:
            return blocks
        owned = (blocks >= 0) & (blocks % self.cp == self.cp_rank)
        return np.where(owned, blocks // self.cp, -1).astype(np.int32)
