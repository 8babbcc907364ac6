"""The steps before "ready" run on any mesh, and read nothing that no step has written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.parity_runs import shape_path
from tests.helpers.ranks import run_ranks
from tests.helpers.step_driver import Driver, Setup
from worker.rehearsal import rehearse

BASE = Setup(shape=shape_path(), numerics="release", slots=3, num_blocks=18, tails=4)
MESHES = (
    BASE,
    replace(BASE, cp=2, shard="cp", dcp=True),
    replace(BASE, cp=2, gather="kv_bf16", combine="ordered", mtp=2),
    replace(BASE, tp=2, mtp=1),
)


def on_rank(rank: int, world: int, setup: Setup) -> int:
    driver, steps = (
        Driver(setup, rank),
        0,
    )  # caches full of NaN: what no step wrote cannot be sampled from
    info = driver.info

    def execute(plan: object) -> object:
        nonlocal steps
        steps += 1
        return driver.worker.execute(plan)  # type: ignore[arg-type]

    rehearse(
        execute,  # type: ignore[arg-type]
        num_slots=info.num_slots,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_batched_tokens=300,
        num_drafts=setup.mtp,
        batches=[1, 2],
        num_tails=info.num_tails,
    )
    return steps


@pytest.mark.parametrize("setup", MESHES, ids=lambda setup: setup.name)
def test_rehearsal(setup: Setup) -> None:
    world = setup.cp * setup.tp
    counts = run_ranks(on_rank, world, setup, timeout=120)
    # Three prompts, one drawn, one in two chunks, one and what goes on behind its tail, two batches.
    assert counts == [3 + 1 + 2 + 2 + 4] * world
