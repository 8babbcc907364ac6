"""Tails at their edges: every draft accepted just past a boundary; a window longer than the prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import load_entries
from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.step_driver import Driver, Part, Request, Row, rows_of

BASE = Setup(shape=shape_path(), load_mtp=False, slots=2)
TOLERANCE = 1e-4
BOUNDARY = 256


def mtp_tail(driver: Driver, tail: int) -> Tensor:
    """The MTP block's window rows in a tail, the last left out: a hit computes it again."""
    cache, rows = driver.pool.mtp, driver.pool.tail_window_rows(tail)[:-1]
    index = torch.from_numpy(rows)
    return load_entries(cache.tail_window, cache.tail_layout, index, torch.float32)


def without_drafts(length: int) -> list[int]:
    """Tokens that greedy decoding gives after a prompt, the prompt included."""
    driver = Driver(BASE)
    request = driver.open(stream(0, length), slot=0)
    driver.generate(request, 8)
    return request.tokens


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_a_tail_after_accepted_drafts_holds_the_whole_mtp_window(drafts: int) -> None:
    """A step begins one row before a boundary and accepts all its drafts; then the tail is saved.

    Found here: with three drafts the block's own drafts had overwritten the tail's oldest row.
    """
    length = BOUNDARY - 1
    coming = without_drafts(length)[length + 1 :]
    driver = Driver(replace(BASE, mtp=drafts))
    owner = driver.open(stream(0, length), slot=0)
    driver.prefill(Part(request=owner, count=length, sample=True, logits=False))
    assert driver.worker._slots is not None
    slot = driver.worker._slots.slots[0]
    assert slot is not None
    slot.drafts = coming[:drafts]
    (out,) = driver.decode(Row(request=owner, drafts=drafts))
    assert out.num_accepted == drafts
    driver.save_tail(owner, BOUNDARY, 3)
    cold: Request = driver.open(owner.tokens[: BOUNDARY + 1], slot=1)
    driver.prefill(Part(request=cold, count=BOUNDARY, tails=((BOUNDARY, 2),), logits=False))
    error = (mtp_tail(driver, 3) - mtp_tail(driver, 2)).abs().nan_to_num(float("inf"))
    assert error.max() < TOLERANCE


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_window_longer_than_the_prefix_of_a_tail(drafts: int) -> None:
    """Found here: a tail at token 128 of a model with a window of 200 asked for rows before 0."""
    driver = Driver(replace(BASE, shape=shape_path(sliding_window=200), mtp=drafts))
    owner = driver.open(stream(0, 300), slot=0)
    driver.prefill(Part(request=owner, count=300, tails=((128, 0), (256, 1))))
    for tail, start in enumerate((128, 256)):
        tokens = stream(0, start) + stream(3, 40)
        cold = driver.open(tokens, slot=0)
        (expected,) = driver.prefill(Part(request=cold, count=len(tokens)))
        shared = owner.blocks[: start // 128]
        warm = driver.open(tokens, slot=1, start=start, tail=tail, blocks=shared)
        (found,) = driver.prefill(Part(request=warm, count=40))
        error = rows_of(found.logits) - rows_of(expected.logits)[start:]
        assert error.abs().nan_to_num(float("inf")).max() < TOLERANCE, start
