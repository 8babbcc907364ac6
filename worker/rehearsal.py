"""Steps that nobody asked for, run before "ready": kernels get compiled, graphs captured.

They write into caches that hold nothing yet, under slots, blocks and tails that are given out anew
afterwards; rings and pages are addressed by position, so no later request reads what they leave.
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
    TailOp,
    TailSave,
)
from worker.tail_positions import inner_tails

_PROMPTS = (512, 100, 7)  # tokens: ends of HCA groups, of CSA groups, of neither
_SHORT = 3  # tokens of the prompts before decode steps
_FILTERED = SamplingParams(temperature=1.0, top_p=0.5)  # draws with noise of its own


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
    num_tails: int = 0,
    tail_interval: int = 1,
    prefill_graphs: bool = False,
) -> None:
    """Run prefill steps of a few lengths, also of a prompt's rest, and decode steps of the batch sizes.

    Args:
        execute: the worker's step; every rank calls this with the same arguments.
        num_slots, num_blocks, block_size, max_model_len: limits of the caches.
        max_batched_tokens: the largest prefill step: what it allocates must fit now, not later.
        num_drafts: tokens a decode step verifies beside the last one.
        batches: requests of the decode steps; more than there are slots are left out.
        num_tails: tails that steps may save and restore; 0 without a prefix cache.
        tail_interval: blocks between the tails inside a long prompt.
        prefill_graphs: whether prefill steps that come back are captured. The largest one runs twice
            then, as the engine will send it for the first chunk of a long prompt, which is therefore
            replayed from the first prompt on; and one of about its size is launched beside the graph:
            what both take must fit.
    """
    room = min(num_blocks * block_size, max_model_len) - num_drafts - 2

    def init(
        slot: int, tokens: int, sampling: SamplingParams | None = None
    ) -> tuple[SlotInit, PrefillSlice]:
        blocks = list(range(-(-(tokens + num_drafts + 2) // block_size)))
        opened = SlotInit(
            request_id=slot,
            slot=slot,
            sampling=sampling or SamplingParams(),
            num_prompt_tokens=tokens,
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

    def first_chunk(tokens: int) -> tuple[SlotInit, PrefillSlice]:
        """Of a prompt that goes on behind it."""
        opened = SlotInit(
            request_id=0, slot=0, sampling=SamplingParams(), num_prompt_tokens=tokens + 1
        )
        ends = inner_tails(0, tokens, block_size=block_size, interval=tail_interval)
        chunk = PrefillSlice(
            request_id=0,
            slot=0,
            start=0,
            token_ids=[0] * tokens,
            next_token=0,
            block_ids=list(range(-(-tokens // block_size))),
            save_tails=[
                TailSave(position=position, tail=tail)
                for tail, position in enumerate(sorted(ends)[:num_tails])
            ],
        )
        return opened, chunk

    def rest_of_prompt(start: int) -> PrefillSlice:
        """One token, and the state that the chunk ahead left."""
        return PrefillSlice(request_id=0, slot=0, start=start, token_ids=[0], sample=True)

    def behind_tail() -> tuple[SlotInit, PrefillSlice]:
        """One token behind the first block, whose tail is restored."""
        opened = SlotInit(
            request_id=0,
            slot=0,
            sampling=SamplingParams(),
            num_prompt_tokens=block_size + 1,
            start=block_size,
            restore_tail=0,
            block_ids=[0],
        )
        chunk = PrefillSlice(
            request_id=0, slot=0, start=block_size, token_ids=[0], block_ids=[1], sample=True
        )
        return opened, chunk

    def prefill(*pairs: tuple[SlotInit, PrefillSlice], saves: Iterable[TailOp] = ()) -> None:
        execute(
            StepPlan(
                step_id=0,
                phase="prefill",
                saves=list(saves),
                inits=[opened for opened, _ in pairs],
                prefill=[chunk for _, chunk in pairs],
            )
        )

    longest = min(max_batched_tokens, room)
    for tokens in sorted({*(n for n in _PROMPTS if n < longest), longest}):
        if tokens > 0:
            prefill(init(0, tokens))
    if longest > 0:
        prefill(init(0, min(_SHORT, longest), _FILTERED))
    if longest > _SHORT:
        prefill(first_chunk(_SHORT))
        execute(StepPlan(step_id=0, phase="prefill", prefill=[rest_of_prompt(_SHORT)]))
    if num_tails > 0 and longest > block_size:
        prefill(init(0, block_size))  # ends where the tail does: nothing else would leave its state
        prefill(behind_tail(), saves=[TailOp(slot=0, position=block_size, tail=0)])
    if prefill_graphs:
        for tokens in (longest, longest, longest - 1):
            if tokens > 0:
                prefill(first_chunk(tokens))
    for batch in batches:
        if batch > num_slots or room < _SHORT:
            continue
        prefill(*(init(slot, _SHORT) for slot in range(batch)))
        rows = [
            DecodeSlice(request_id=s, slot=s, position=_SHORT, num_tokens=1 + num_drafts)
            for s in range(batch)
        ]
        execute(StepPlan(step_id=0, phase="decode", decode=rows))
