"""Prefill steps through static copies of their metadata: the bits of steps that are launched.

The replay is a stand-in (tests.helpers.replay): what is tested is the way through key, books, copies
and padded tables around the real model, on every rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.ranks import run_ranks
from tests.helpers.replay import FakeRecorder
from tests.helpers.step_driver import Driver, Part, rows_of
from worker.prefill_graph import PrefillGraphs

CHUNK, CHUNKS, PROMPTS = 256, 5, 2


def with_replays(driver: Driver) -> FakeRecorder:
    """Make the driver's runner capture prefill steps."""
    runner, recorder = driver.worker._runner, FakeRecorder()
    assert runner is not None
    model, layers = runner.model, driver.pool.layers
    runner.prefill_graphs = PrefillGraphs(lambda batch: model.prefill(batch, layers), recorder)
    runner.prefill_builder.pad_tables = True
    return recorder


def logits(driver: Driver) -> list[Tensor]:
    """Of prompts in chunks, with drafts behind them; the second prompt goes to other slots and blocks."""
    found = []
    for number in range(PROMPTS):
        request = driver.open(stream(number, CHUNK * CHUNKS), slot=3 * number)
        for chunk in range(CHUNKS):
            last = chunk == CHUNKS - 1
            (out,) = driver.prefill(
                Part(request=request, count=CHUNK, sample=last, mtp_logits=not last)
            )
            found += [rows_of(out.logits)] + ([] if last else [rows_of(out.mtp_logits)])
    return found


def compare(setup: Setup, rank: int) -> tuple[bool, int]:
    launched = logits(Driver(setup, rank))
    driver = Driver(setup, rank)
    recorder = with_replays(driver)
    replayed = logits(driver)
    return all(map(torch.equal, launched, replayed)), recorder.captures


def rank_compares(rank: int, size: int, setup: Setup) -> tuple[bool, int]:
    return compare(replace(setup, cp=size), rank)


SETUP = Setup(shape=shape_path(), load_mtp=True, mtp=1, slots=4)


def test_replayed_prefill_changes_no_bit() -> None:
    same, captures = compare(SETUP, 0)
    assert same
    assert captures == 3  # the first chunk; the second; all later ones


def test_replayed_prefill_changes_no_bit_on_two_ranks() -> None:
    assert run_ranks(rank_compares, 2, SETUP, timeout=120) == [(True, 3)] * 2
