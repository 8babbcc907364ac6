from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import KernelContractError, topk_merge, topk_select
from tests.kernels.oracle64 import report

NAN, INF = float("nan"), float("inf")


def choose(row: list[float], k: int, start: int = 0, end: int | None = None) -> list[int]:
    """The contract, spelled out for one row."""
    stop = len(row) if end is None else min(end, len(row))
    columns = [
        c for c in range(max(start, 0), stop) if not math.isnan(row[c]) and row[c] != -math.inf
    ]
    best = sorted(columns, key=lambda c: (-row[c], c))[:k]
    return sorted(c - start for c in best) + [-1] * (k - len(best))


def expect(got: torch.Tensor, want: list[list[int]]) -> None:
    assert got.dtype is torch.int32
    assert got.tolist() == want


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-40, INF, -INF, NAN])


@given(
    rows=st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=4)
    ),
    k=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_any_rows_any_k(rows: list[list[float]], k: int) -> None:
    if not rows:
        return
    expect(topk_select(torch.tensor(rows), k), [choose(row, k) for row in rows])


@given(seed=st.integers(0, 2**31 - 1), k=st.sampled_from([1, 2, 7, 16, 40]))
@settings(max_examples=40, deadline=None)
def test_many_ties(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (5, 31), generator=generator).float()
    expect(topk_select(scores, k), [choose(row, k) for row in scores.tolist()])


@pytest.mark.parametrize("k", [1, 512, 1024, 2048])
def test_topk_padded_rows_vllm_42169(k: int) -> None:
    """Rows padded to a multiple of 256 with +inf: the width is not the row stride."""
    for width in (1, 255, 256, 700, 1500):
        dense = torch.randn(3, width)
        padded = torch.full((3, 256 * (width // 256 + 1)), INF)
        padded[:, :width] = dense
        view = padded[:, :width]
        assert view.stride(0) != width
        assert torch.equal(topk_select(view, k), topk_select(dense, k))
        expect(topk_select(view, k), [choose(row, k) for row in dense.tolist()])


def test_offset_and_skipping_rows() -> None:
    wide = torch.full((9, 64), INF)
    dense = torch.randn(3, 20)
    wide[1::3, 7:27] = dense
    expect(topk_select(wide[1::3, 7:27], 6), [choose(row, 6) for row in dense.tolist()])


@pytest.mark.parametrize("k", [1, 5, 2048])
def test_topk_row_starts_vllm_42810(k: int) -> None:
    """Indices are relative to row_start, and nothing outside [row_start, row_end) is looked at."""
    scores = torch.randn(6, 40).round(decimals=1)
    start = torch.tensor([0, 3, 39, 10, 40, 20])
    end = torch.tensor([40, 9, 40, 10, 40, 15])
    for t in range(6):  # poison outside, of both kinds
        scores[t, : start[t]] = INF
        scores[t, end[t] :] = NAN if t % 2 else INF
    want = [
        choose(row, k, s, e)
        for row, s, e in zip(scores.tolist(), start.tolist(), end.tolist(), strict=True)
    ]
    expect(topk_select(scores, k, start, end), want)
    buffer = torch.full((12, 300), INF)
    buffer[::2, 5:45] = scores
    expect(topk_select(buffer[::2, 5:45], k, start, end), want)


def test_only_start_or_only_end() -> None:
    scores = torch.randn(3, 12)
    bound = torch.tensor([0, 5, 12])
    rows = scores.tolist()
    expect(
        topk_select(scores, 4, row_start=bound),
        [choose(r, 4, start=b) for r, b in zip(rows, bound.tolist(), strict=True)],
    )
    expect(
        topk_select(scores, 4, row_end=bound),
        [choose(r, 4, end=b) for r, b in zip(rows, bound.tolist(), strict=True)],
    )


def test_ragged_rows_with_poison_vllm_55299() -> None:
    """Rows of -inf beyond their visible entries, all-hidden rows, NaN rows: -1 fills the rest."""
    scores = torch.randn(5, 33)
    for t, seen in enumerate((0, 1, 16, 17, 33)):
        scores[t, seen:] = -INF
    scores[4] = NAN
    expect(topk_select(scores, 16), [choose(row, 16) for row in scores.tolist()])


def test_empty_shapes() -> None:
    assert topk_select(torch.zeros(0, 7), 3).shape == (0, 3)
    expect(topk_select(torch.zeros(2, 0), 3), [[-1] * 3] * 2)
    assert topk_select(torch.zeros(2, 4), 0).shape == (2, 0)


def test_many_rows_sglang_34822() -> None:
    scores = torch.randn(66_000, 6)
    got = topk_select(scores, 2)
    for t in (0, 65_535, 65_536, 65_999):
        assert got[t].tolist() == choose(scores[t].tolist(), 2)


def test_rows_beyond_one_chunk() -> None:
    scores = torch.randn(6, 1 << 20)
    got = topk_select(scores, 3)
    for t in range(6):
        assert got[t].tolist() == sorted(scores[t].topk(3).indices.tolist())


@given(seed=st.integers(0, 2**31 - 1), parts=st.integers(1, 4), k=st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_merge_of_shards_is_the_whole(seed: int, parts: int, k: int) -> None:
    """Local top-k of interleaved shards, merged, gives the global top-k, ties included."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (4, 24), generator=generator).float()
    scores[scores == -3] = -INF
    scores[scores == 3] = NAN
    values, indices = [], []
    for part in range(parts):
        owned = torch.arange(part, 24, parts)
        local = topk_select(scores[:, owned], k).long()
        values.append(scores[:, owned].gather(1, local.clamp(min=0)))
        indices.append(torch.where(local < 0, -1, owned[local.clamp(min=0)]).int())
    order = torch.randperm(parts * k, generator=generator)
    merged = topk_merge(torch.cat(values, 1)[:, order], torch.cat(indices, 1)[:, order], k)
    assert merged.dtype is torch.int32
    assert torch.equal(merged, topk_select(scores, k))


def test_merge_ignores_poison_of_missing_candidates() -> None:
    values = torch.tensor([[INF, 1.0, NAN, 2.0, -INF], [INF, INF, INF, INF, INF]])
    indices = torch.tensor([[-1, 9, 4, 3, 2], [-1, -1, -1, -1, -1]], dtype=torch.int32)
    expect(topk_merge(values, indices, 3), [[3, 9, -1], [-1, -1, -1]])
    expect(topk_merge(values, indices, 1), [[3], [-1]])


def test_merge_ties_strides_and_empties() -> None:
    values = torch.full((1, 12), INF)
    indices = torch.zeros(1, 12, dtype=torch.int32)
    values[:, 4:8] = 1.0
    indices[:, 4:8] = torch.tensor([30, 10, 40, 20])
    expect(topk_merge(values[:, 4:8], indices[:, 4:8], 2), [[10, 20]])
    nothing = torch.zeros(2, 0, dtype=torch.int32)
    expect(topk_merge(torch.zeros(2, 0), nothing, 2), [[-1, -1]] * 2)
    assert topk_merge(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.int32), 2).shape == (0, 2)


def test_contract() -> None:
    scores = torch.zeros(2, 4)
    with pytest.raises(KernelContractError, match="k = -1"):
        topk_select(scores, -1)
    with pytest.raises(KernelContractError, match="scores"):
        topk_select(scores.half(), 1)
    with pytest.raises(KernelContractError, match="row_start"):
        topk_select(scores, 1, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(KernelContractError, match="row_end"):
        topk_select(scores, 1, None, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(KernelContractError, match="stride"):
        topk_select(torch.zeros(4, 2).T, 1)
    with pytest.raises(KernelContractError, match="indices"):
        topk_merge(scores, torch.zeros(2, 4, dtype=torch.int64), 1)


@pytest.mark.benchmark
def test_benchmark() -> None:
    scores = torch.randn(256, 8192)
    report("topk_select 256x8192, k 512", lambda: topk_select(scores, 512))
