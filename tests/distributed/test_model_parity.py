"""The whole model on every mesh gives the logits of one rank that computes each request alone.

``SETUPS`` are run by ``make test``, ``FULL`` besides by ``make test-full``; tests/oracle holds the one
rank to an independent implementation.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from torch import Tensor

from tests.helpers.model_setup import Setup
from tests.helpers.parity_runs import (
    CHUNKS,
    TOGETHER,
    Outcome,
    mesh,
    on_ranks,
    reference,
    shape_path,
)

BASE = Setup(shape=shape_path())
NARROW = Setup(shape=shape_path(o_groups=2))  # groups do not divide by 4 ranks: decode uses tp only
GATHERS, SHARDS = ("kv_bf16", "compressed"), ("replicate", "cp")

ONE = (BASE,)
TWO = (
    *(mesh(BASE, 2, 1, gather=g, shard=s) for g, s in itertools.product(GATHERS, SHARDS)),
    mesh(BASE, 1, 2),
    mesh(BASE, 2, 1, min_tokens=200, combine="ordered", block_size=256),
)
FOUR = (
    mesh(BASE, 2, 2, gather="compressed", shard="cp"),
    mesh(BASE, 2, 2, gather="kv_bf16", dcp=True),
    mesh(BASE, 4, 1, gather="compressed", combine="ordered"),
    mesh(BASE, 4, 1, gather="kv_bf16", shard="cp", dcp=True),
    mesh(BASE, 4, 1, gather="compressed", min_tokens=130, shard="cp", block_size=384),
)
FULL_FOUR = tuple(  # by process start
    tuple(
        mesh(BASE, cp, tp, gather=gather, shard=shard, combine=combine, dcp=dcp, block_size=256)
        for combine, dcp in itertools.product(("fast", "ordered"), (False, True))
    )
    for (cp, tp), gather, shard in itertools.product(((2, 2), (4, 1)), GATHERS, SHARDS)
)
NARROW_FOUR = (mesh(NARROW, 2, 2, shard="cp"), mesh(NARROW, 4, 1, shard="cp", dcp=True))
TOLERANCE = 1e-4  # logits are near a unit normal; float32 rounding gives 5e-6, a wrong row 1


def worst(found: list[tuple[int, int, Tensor]], expected: list[tuple[int, int, Tensor]]) -> float:
    """Largest difference over all rows; NaN counts as infinite."""
    whole = {number: rows for number, _, rows in expected}
    largest = 0.0
    for number, start, rows in found:
        error = (rows - whole[number][start : start + len(rows)]).abs().nan_to_num(float("inf"))
        largest = max(largest, error.max().item()) if rows.numel() else largest
    return largest


def check(setups: tuple[Setup, ...], setup: Setup, base: Setup) -> None:
    got, expected = on_ranks(setups)[0][setup.name], reference(base)
    assert worst(got.logits, expected.logits) < TOLERANCE
    assert worst(got.mtp_logits, expected.mtp_logits) < TOLERANCE


@pytest.mark.parametrize("setup", [*ONE, *TWO], ids=lambda s: s.name)
def test_same_logits_on_one_and_two_ranks_sglang_24560_26375_24650(setup: Setup) -> None:
    check(ONE if setup in ONE else TWO, setup, BASE)


@pytest.mark.parametrize("setup", FOUR, ids=lambda s: s.name)
def test_same_logits_on_four_ranks_sglang_24560_26375_24650(setup: Setup) -> None:
    check(FOUR, setup, BASE)


@pytest.mark.full
@pytest.mark.parametrize("setup", [*itertools.chain(*FULL_FOUR)], ids=lambda s: s.name)
def test_same_logits_on_four_ranks_in_every_way_sglang_27928(setup: Setup) -> None:
    check(next(group for group in FULL_FOUR if setup in group), setup, BASE)


@pytest.mark.full
@pytest.mark.parametrize("setup", NARROW_FOUR, ids=lambda s: s.name)
def test_same_logits_where_decode_falls_back_to_tp(setup: Setup) -> None:
    check(NARROW_FOUR, setup, NARROW)


def test_every_row_of_the_program_was_answered() -> None:
    """A program that returned nothing would pass every comparison."""

    def rows(outcome: Outcome) -> Counter[int]:
        count: Counter[int] = Counter()
        for number, _, logits in outcome.logits:
            count[number] += len(logits)
        return count

    expected: Counter[int] = Counter()
    for lengths in TOGETHER:
        expected.update(dict(enumerate(lengths)))
    expected.update({i: ends[-1] + 7 for i, ends in enumerate(CHUNKS)})
    assert rows(on_ranks(ONE)[0][BASE.name]) == expected


def test_program_covers_the_lengths_and_starts_of_the_specification() -> None:
    lengths = {n for step in TOGETHER for n in step}
    assert {n % c for n in lengths for c in (2,)} == {0, 1}
    assert {n % 4 for n in lengths} == {0, 1, 2, 3}
    assert min(lengths) < 2
    assert {n - 128 * round(n / 128) for n in lengths if n > 100} >= {-1, 0, 1}
    starts = {end % 128 for ends in CHUNKS for end in (0, *ends[:-1])}
    assert starts >= {0, 1, 2, 3, 126, 127}
