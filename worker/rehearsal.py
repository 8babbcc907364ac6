"""Steps that nobody asked for, run before "ready": kernels get compiled, decode graphs captured.

They write into caches that hold nothing yet, under slots and blocks that are given out anew afterwards;
rings and pages are addressed by position, so no later request reads what they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from worker.protocol import (
    DecodeSlice,
    PrefillSlice,
    SamplingParams,
    SlotInit,
    StepOutput,
    StepPlan,
)

_PROMPTS = (512, 100, 7)  # tokens: ends of HCA groups, of CSA groups, of neither
_SHORT = 3  # tokens of the prompts before decode steps


def rehearse(
    execute: Callable[[StepPlan], StepOutput],
    *,
    num_slots: int,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    max_batched_tokens: int,
    num_drafts: int,
    batches: Iterable[int],
    longest_runs: int = 1,
) -> None:
    """Run prefill steps of a few lengths and decode steps of the given batch sizes.

    Args:
        execute: the worker's step; every rank calls this with the same arguments.
        num_slots, num_blocks, block_size, max_model_len: limits of the caches.
        max_batched_tokens: the largest prefill step: what it allocates must fit now, not later.
        num_drafts: tokens a decode step verifies beside the last one.
        batches: requests of the decode steps; more than there are slots are left out.
        longest_runs: how often the largest prefill step is run.
    """
    room = min(num_blocks * block_size, max_model_len) - num_drafts - 2

    def init(slot: int, tokens: int) -> tuple[SlotInit, PrefillSlice]:
        blocks = list(range(-(-(tokens + num_drafts + 2) // block_size)))
        opened = SlotInit(
            request_id=slot, slot=slot, sampling=SamplingParams(), num_prompt_tokens=tokens
        )
        chunk = PrefillSlice(
            request_id=slot,
            slot=slot,
            start=0,
            token_ids=[0] * tokens,
            block_ids=blocks,
            sample=True,
        )
        return opened, chunk

    def prefill(slots: int, tokens: int) -> None:
        pairs = [init(slot, tokens) for slot in range(slots)]
        execute(
            StepPlan(
                step_id=0,
                phase="prefill",
                inits=[opened for opened, _ in pairs],
                prefill=[chunk for _, chunk in pairs],
            )
        )

    longest = min(max_batched_tokens, room)
    for tokens in sorted({*(n for n in _PROMPTS if n < longest), longest}):
        for _ in range(longest_runs if tokens == longest else 1):
            if tokens > 0:
                prefill(1, tokens)
    for batch in batches:
        if batch > num_slots or room < _SHORT:
            continue
        prefill(batch, _SHORT)
        rows = [
            DecodeSlice(request_id=s, slot=s, position=_SHORT, num_tokens=1 + num_drafts)
            for s in range(batch)
        ]
        execute(StepPlan(step_id=0, phase="decode", decode=rows))
