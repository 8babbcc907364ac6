"""Step plans that feed a given text to a worker and ask for every logit."""

from __future__ import annotations

from worker.protocol import DecodeSlice, PrefillSlice, SamplingParams, SlotInit, StepPlan


def forced_plans(ids: list[int], prefilled: int, block_ids: list[int]) -> list[StepPlan]:
    """Plans of one request in slot 1: prefill, then one given token a step, all rows' logits asked for.

    Args:
        ids: the whole text; the first ``prefilled`` of it are the prompt.
        block_ids: pool blocks with room for all of it.
    """
    init = SlotInit(request_id=1, slot=1, sampling=SamplingParams(), num_prompt_tokens=len(ids))
    prompt = PrefillSlice(
        request_id=1,
        slot=1,
        start=0,
        token_ids=ids[:prefilled],
        next_token=ids[prefilled],
        block_ids=block_ids,
        logits=True,
    )
    steps = [StepPlan(step_id=0, phase="prefill", inits=[init], prefill=[prompt])]
    for position in range(prefilled, len(ids)):
        row = DecodeSlice(
            request_id=1,
            slot=1,
            position=position,
            num_tokens=1,
            token_ids=[ids[position]],
            logits=True,
        )
        steps.append(StepPlan(step_id=position, phase="decode", decode=[row]))
    return steps
