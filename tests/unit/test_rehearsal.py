"""The steps before "ready": within the caches' limits, and every size of decode step once."""

from __future__ import annotations

import pytest

from worker.protocol import StepOutput, StepPlan
from worker.rehearsal import rehearse


def steps(*, longest_runs: int = 1, **limits: int) -> list[StepPlan]:
    seen: list[StepPlan] = []

    def execute(plan: StepPlan) -> StepOutput:
        seen.append(plan)
        return StepOutput(step_id=plan.step_id, rank=0, outputs=[], seconds=0.0)

    limits = {
        "num_slots": 4,
        "num_blocks": 8,
        "block_size": 256,
        "max_model_len": 4096,
        "max_batched_tokens": 1000,
        "num_drafts": 1,
    } | limits
    rehearse(execute, batches=[1, 2, 4, 8], longest_runs=longest_runs, **limits)
    return seen


def test_prompts_up_to_the_largest_step_and_every_batch() -> None:
    plans = steps()
    prompts = [[len(s.token_ids) for s in p.prefill] for p in plans if p.phase == "prefill"]
    assert prompts == [[7], [100], [512], [1000], [3], [3] * 2, [3] * 4]
    decodes = [p.decode for p in plans if p.phase == "decode"]
    assert [len(rows) for rows in decodes] == [1, 2, 4]  # 8 is more than there are slots
    assert all(row.num_tokens == 2 and row.position == 3 for rows in decodes for row in rows)


def test_the_largest_step_may_run_again_to_be_captured() -> None:
    plans = [p for p in steps(longest_runs=2) if p.phase == "prefill"]
    assert [len(p.prefill[0].token_ids) for p in plans[:5]] == [7, 100, 512, 1000, 1000]
    assert plans[3].prefill == plans[4].prefill


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("length", [3, 6, 300, 5000])
def test_no_step_leaves_the_caches(blocks: int, length: int) -> None:
    for plan in steps(num_blocks=blocks, max_model_len=length):
        for chunk in plan.prefill:
            assert max(chunk.block_ids) < blocks
            last = (
                chunk.start + len(chunk.token_ids) + 2
            )  # and a decode step of a token and a draft
            assert last <= len(chunk.block_ids) * 256
            assert last <= length
