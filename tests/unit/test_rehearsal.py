"""The steps before "ready": within the caches' limits, and every size of decode step once."""

from __future__ import annotations

import pytest

from worker.protocol import StepOutput, StepPlan
from worker.rehearsal import rehearse


def steps(*, prefill_graphs: bool = False, **limits: int) -> list[StepPlan]:
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
    rehearse(execute, batches=[1, 2, 4, 8], prefill_graphs=prefill_graphs, **limits)
    return seen


def test_prompts_up_to_the_largest_step_and_every_batch() -> None:
    plans = steps()
    prompts = [[len(s.token_ids) for s in p.prefill] for p in plans if p.phase == "prefill"]
    assert prompts == [[7], [100], [512], [1000], [3], [3], [1], [3], [3] * 2, [3] * 4]
    decodes = [p.decode for p in plans if p.phase == "decode"]
    assert [len(rows) for rows in decodes] == [1, 2, 4]  # 8 is more than there are slots
    assert all(row.num_tokens == 2 and row.position == 3 for rows in decodes for row in rows)


def test_what_only_some_requests_need_is_rehearsed() -> None:
    """Filtered sampling, and a tail that is saved and restored: each runs kernels of its own."""
    plans = steps(num_tails=2)
    inits = [init for plan in plans for init in plan.inits]
    assert sum(init.sampling.filters for init in inits) == 1
    (plan,) = (plan for plan in plans if plan.saves)
    (save,), (init,), (chunk,) = plan.saves, plan.inits, plan.prefill
    assert (save.slot, save.position, save.tail) == (0, 256, 0)
    assert (init.start, init.restore_tail, init.block_ids) == (256, 0, [0])
    assert (chunk.start, chunk.block_ids) == (256, [1])
    assert not any(plan.saves for plan in steps(num_tails=0))
    assert not any(plan.saves for plan in steps(num_tails=2, num_blocks=1))


def test_the_largest_step_is_captured_and_one_runs_beside_the_graph() -> None:
    plans = steps(prefill_graphs=True, num_tails=4, tail_interval=2)
    chunks = [p.prefill[0] for p in plans if p.phase == "prefill"][:12]
    lengths = [len(c.token_ids) for c in chunks]
    assert lengths == [7, 100, 512, 1000, 3, 3, 1, 256, 1, 1000, 1000, 999]
    assert [c.start for c in chunks if c.start] == [3, 256]
    assert chunks[9] == chunks[10]
    assert not chunks[9].sample
    assert [save.position for save in chunks[9].save_tails] == [512]


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("length", [3, 6, 300, 5000])
@pytest.mark.parametrize("graphs", [False, True])
def test_no_step_leaves_the_caches(blocks: int, length: int, graphs: bool) -> None:
    limits = {"num_blocks": blocks, "max_model_len": length, "num_tails": 1, "tail_interval": 1}
    held: dict[int, int] = {}  # blocks of each slot
    for plan in steps(**limits, prefill_graphs=graphs):
        held |= {init.slot: len(init.block_ids) for init in plan.inits}
        for chunk in plan.prefill:
            assert max(chunk.block_ids, default=0) < blocks
            assert all(save.tail == 0 for save in chunk.save_tails)
            held[chunk.slot] += len(chunk.block_ids)
            last = chunk.start + len(chunk.token_ids)
            if chunk.sample:
                last += 2  # and a decode step of a token and a draft
            assert last <= held[chunk.slot] * 256
            assert last <= length
