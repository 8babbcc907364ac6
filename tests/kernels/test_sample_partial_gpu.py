"""Sampling from a split vocabulary on the GPU: the twin's tokens and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import PartialSample
from kernels.sample_partial import reference
from tests.helpers.gpu import DEVICE, Implementation, there
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
impl = Implementation("kernels.sample_partial.cuda_impl")
merging = Implementation("kernels.sample_partial.triton_impl")


def same(got: PartialSample, want: PartialSample) -> None:
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.score, want.score)
    assert torch.allclose(got.lse, want.lse, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 30.0])
@pytest.mark.parametrize(
    ("rows", "columns", "offset", "gap"),
    [
        (1, 129280, 0, 4),
        (32, 32320, 32320, 0),
        (300, 32320, 96960, 3),
        (5, 3, 7, 0),
        (7, 1000, 0, 4),
    ],
)
def test_the_twins_tokens(rows: int, columns: int, offset: int, gap: int, scale: float) -> None:
    whole = torch.randn(rows, columns) * scale
    logits = there(column_slice(whole, gap, 2 * gap) if gap else whole)
    temperature = there(torch.tensor([1.0, 0.0, 0.3, 1e-40, 5.0, 1e30]).repeat(rows)[:rows])
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), device=DEVICE)
    args = (logits, temperature, seeds, torch.arange(rows, device=DEVICE) * 7 - 3)
    limit = offset + columns - columns // 7
    peak = logits.amax(-1) + 0.25 * (torch.arange(rows, device=DEVICE) % 8)
    for top in (peak, None):
        kwargs: dict[str, Any] = {"vocab_offset": offset, "vocab_size": limit, "peak": top}
        got = impl.sample_partial(*args, **kwargs)
        same(got, reference.sample_partial(*args, **kwargs))
    row = rows // 2
    alone = impl.sample_partial(
        *(a[row : row + 1].clone() for a in args), vocab_offset=offset, vocab_size=limit
    )
    assert torch.equal(alone.lse[0], got.lse[row])
    assert torch.equal(alone.ids[0], got.ids[row])


def test_many_seeds_at_both_ends_of_the_noise() -> None:
    """Peaked rows, where a token wins by a hair or by rare noise: estimates must not lose one."""
    logits = torch.zeros(4096, 512, device=DEVICE)
    logits[:, 0] = there(torch.linspace(0, 12, 4096))
    seeds = torch.arange(4096, device=DEVICE)
    args = (logits, torch.ones(4096, device=DEVICE), seeds, seeds % 5)
    kwargs: dict[str, Any] = {"vocab_offset": 0, "vocab_size": 512}
    same(impl.sample_partial(*args, **kwargs), reference.sample_partial(*args, **kwargs))


def test_rows_that_cannot_be_sampled_from() -> None:
    logits = torch.randn(5, 3000, device=DEVICE)
    logits[0, 3], logits[1, 2999], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, :1500] = float("-inf")
    numbers = torch.arange(5, device=DEVICE)
    for warmth in (0.0, 1.0):
        part = impl.sample_partial(
            logits,
            torch.full((5,), warmth, device=DEVICE),
            numbers,
            numbers,
            vocab_offset=100,
            vocab_size=9999,
        )
        assert part.lse.isfinite().tolist() == [False, False, False, True, True]
        assert bool(((part.ids >= 100) & (part.ids < 3100)).all())
        assert int(part.ids[3]) >= 1600
        empty = impl.sample_partial(
            logits[2:3],
            torch.full((1,), warmth, device=DEVICE),
            numbers[:1],
            numbers[:1],
            vocab_offset=100,
            vocab_size=9999,
            peak=torch.ones(1, device=DEVICE),
        )
        assert (float(empty.score), int(empty.ids), float(empty.lse)) == (
            float("-inf"),
            100,
            float("-inf"),
        )


def test_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    part = impl.sample_partial(
        torch.empty(0, 8, device=DEVICE),
        torch.empty(0, device=DEVICE),
        none,
        none,
        vocab_offset=0,
        vocab_size=8,
    )
    assert part.ids.shape == (0,)


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (2, 32), (4, 65), (3, 0), (8, 70_001)])
def test_merge_is_the_twins(ranks: int, rows: int) -> None:
    """Against float64 sums; equal scores on several ranks go to the first."""
    score = torch.randn(ranks, rows, device=DEVICE).round(decimals=1)
    ids = torch.randint(0, 1 << 40, (ranks, rows), device=DEVICE)
    lse = torch.randn(ranks, rows, device=DEVICE) * 20
    got_ids, got = merging.merge_samples(score, ids, lse)
    want_ids, want = reference.merge_samples(score, ids, lse.double())
    assert torch.equal(got_ids, want_ids)
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)
    if rows:
        columns = [t[:, rows // 2 : rows // 2 + 1] for t in (score, ids, lse)]  # rows with a stride
        assert torch.equal(merging.merge_samples(*columns)[1][0], got[rows // 2])


def test_merge_of_rows_that_cannot_be_sampled_from() -> None:
    lse = torch.zeros(3, 5, device=DEVICE)
    lse[1, 0], lse[2, 1], lse[:, 2] = float("nan"), float("inf"), float("-inf")
    lse[0, 3] = float("-inf")  # a rank without a token; the row is fine
    score, ids = lse.clone(), torch.arange(15, device=DEVICE).view(3, 5)
    found, total = merging.merge_samples(score, ids, lse)
    assert total.isfinite().tolist() == [False, False, False, True, True]
    assert found[2:].tolist() == [2, 8, 4]
    assert torch.equal(found[2:], reference.merge_samples(score, ids, lse)[0][2:])
