"""``index_topk`` chooses what the two ops that it joins choose."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    CacheDtype,
    EntryKind,
    KernelContractError,
    PageLayout,
    index_score,
    index_topk,
    store_entries,
    topk_select,
)
from kernels.index_topk import reference
from tests.kernels.oracle64 import report

LAYOUT = PageLayout(
    kind=EntryKind.INDEX, dtype=CacheDtype.FP8, head_dim=32, rope_dim=0, entries_per_page=4
)


def inputs(rows: int) -> tuple[torch.Tensor, ...]:
    pool = torch.full((9, LAYOUT.page_bytes), 0xFF, dtype=torch.uint8)
    store_entries(pool, LAYOUT, torch.arange(36), torch.randn(36, 32))
    table = torch.tensor([[3, 1, -1, 5], [0, 7, 2, 8]], dtype=torch.int32)
    row_seq = torch.arange(rows) * 2 // max(rows, 1)
    row_seq[1::5] = -1
    return (
        torch.randn(rows, 3, 32),
        torch.randn(rows, 3),
        pool,
        table,
        row_seq,
        torch.randint(0, 17, (rows,)),
    )


@pytest.mark.parametrize("k", [0, 1, 6, 40])
@pytest.mark.parametrize("rows", [0, 1, 23])
def test_equals_score_then_select(rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, w, pool, table, row_seq, num = inputs(rows)
    want = topk_select(index_score(q, w, pool, LAYOUT, table, row_seq, num), k)
    for limit in (1 << 24, 40):  # at once, and in slices of a few rows
        monkeypatch.setattr(reference, "_MAX_SCORES", limit)
        got = index_topk(q, w, pool, LAYOUT, table, row_seq, num, k)
        assert got.shape == (rows, k)
        assert torch.equal(got, want)


def test_head_weights_are_rounded_and_scaled() -> None:
    """``head_scale``: raw products become q's dtype first, as the official product does."""
    q, w, pool, table, row_seq, num = inputs(40)
    q, scale = q.bfloat16(), 0.0110485
    args = (pool, LAYOUT, table, row_seq, num, 3)
    got = index_topk(q, w, *args, head_scale=scale)
    assert torch.equal(got, index_topk(q, w.bfloat16().float() * scale, *args))
    with pytest.raises(KernelContractError, match="head_scale"):
        index_topk(q, w, *args, head_scale=0.0)


def test_contract() -> None:
    q, w, pool, table, row_seq, num = inputs(4)
    with pytest.raises(KernelContractError, match="k = -1"):
        index_topk(q, w, pool, LAYOUT, table, row_seq, num, -1)
    with pytest.raises(KernelContractError, match="row_seq"):
        index_topk(q, w, pool, LAYOUT, table, row_seq[:3], num, 2)
    with pytest.raises(KernelContractError, match="index entries of 16"):
        index_topk(q[..., :16], w, pool, LAYOUT, table, row_seq, num, 2)


@pytest.mark.benchmark
def test_benchmark() -> None:
    q, w, pool, table, row_seq, num = inputs(256)
    report(
        "index_topk 256 rows of 16, k 8",
        lambda: index_topk(q, w, pool, LAYOUT, table, row_seq, num, 8),
    )
