from __future__ import annotations

import pytest
import torch

from kernels import (
    CacheDtype,
    KernelContractError,
    index_score,
    load_entries,
    store_entries,
    topk_select,
    wide_dtype,
)
from tests.kernels.oracle64 import (
    CACHE_DTYPES,
    DTYPES,
    assert_close,
    column_slice,
    index_layout,
    latent_layout,
    poisoned_pool,
    report,
)

INF = float("inf")
DIM = 128


class Case:
    """Two sequences whose pages are scattered over a pool that is otherwise NaN."""

    def __init__(
        self, cache: CacheDtype, counts: tuple[int, ...] = (11, 6), per_page: int = 4
    ) -> None:
        self.layout = index_layout(cache, DIM, per_page)
        blocks = max(-(-c // per_page) for c in counts) + 1
        self.pool = poisoned_pool(self.layout, blocks * len(counts) + 2)
        order = torch.randperm(self.pool.shape[0])[: blocks * len(counts)]
        self.block_table = order.view(len(counts), blocks).int()
        self.keys: list[torch.Tensor] = []
        for seq, count in enumerate(counts):
            entry = torch.arange(count)
            slots = self.block_table[seq].long()[entry // per_page] * per_page + entry % per_page
            store_entries(self.pool, self.layout, slots, torch.randn(count, DIM))
            self.keys.append(load_entries(self.pool, self.layout, slots, torch.float32))

    def run(
        self, q: torch.Tensor, w: torch.Tensor, row_seq: list[int], num_entries: list[int]
    ) -> torch.Tensor:
        return index_score(
            q,
            w,
            self.pool,
            self.layout,
            self.block_table,
            torch.tensor(row_seq, dtype=torch.int64),
            torch.tensor(num_entries, dtype=torch.int64),
        )


def score64(q: torch.Tensor, w: torch.Tensor, key: torch.Tensor) -> float:
    total = 0.0
    for h in range(q.shape[0]):
        total += max(float(q[h].double() @ key.double()), 0.0) * float(w[h])
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_against_fp64(dtype: torch.dtype, cache: CacheDtype) -> None:
    case = Case(cache)
    row_seq, num_entries = [0, 0, 1, 1, 0, 1], [11, 4, 5, 0, 7, 6]
    q, w = torch.randn(6, 3, DIM).to(dtype), torch.randn(6, 3)
    got = case.run(q, w, row_seq, num_entries)
    assert got.dtype is wide_dtype(dtype)
    assert got.shape == (6, 11)
    want = torch.full((6, 11), -INF, dtype=torch.float64)
    for t, (seq, count) in enumerate(zip(row_seq, num_entries, strict=True)):
        for e in range(count):
            want[t, e] = score64(q[t], w[t], case.keys[seq][e].to(dtype))
    assert torch.equal(got == -INF, want == -INF)
    seen = want > -INF
    assert_close(got[seen], want[seen], wide_dtype(dtype))


@pytest.mark.parametrize("width", [1, 11, 255, 256, 300])
def test_padded_stride_and_poison_vllm_42169(width: int) -> None:
    case = Case(CacheDtype.FP32, counts=(width,), per_page=64)
    q, w = torch.randn(3, 2, DIM), torch.rand(3, 2)
    got = case.run(q, w, [0, 0, 0], [width, width // 2, 0])
    assert got.shape == (3, width)
    assert got.stride(0) % 256 == 0
    assert got.stride(0) > width
    beyond = got.as_strided((3, got.stride(0) - width), (got.stride(0), 1), width)
    assert (beyond == INF).all()
    picked = topk_select(got, 4)
    assert int(picked.max()) < width
    assert picked[2].tolist() == [-1] * 4


def test_missing_pages_and_missing_rows() -> None:
    case = Case(CacheDtype.FP8)
    q, w = torch.randn(2, 2, DIM), torch.rand(2, 2)
    whole = case.run(q, w, [0, 0], [11, 11])
    case.block_table[0, 1] = -1
    got = case.run(q, w, [0, 0], [11, 11])
    assert (got[:, 4:8] == -INF).all()
    assert torch.equal(got[:, :4], whole[:, :4])
    assert torch.equal(got[:, 8:], whole[:, 8:])
    assert (case.run(q, w, [-1, 0], [9, 2])[0] == -INF).all()
    case.block_table[0] = -1
    assert (case.run(q, w, [0, 0], [11, 3]) == -INF).all()


def test_unwritten_entries_vllm_51252() -> None:
    """NaN behind the visible entries, in the same page and in unused pages, is never seen."""
    case = Case(CacheDtype.FP8, counts=(5, 5), per_page=4)
    q, w = torch.randn(4, 2, DIM), torch.rand(4, 2)
    got = case.run(q, w, [0, 0, 1, 1], [5, 1, 4, 5])
    assert not torch.isnan(got).any()


def test_more_entries_than_one_tile() -> None:
    case = Case(CacheDtype.FP32, counts=(4500,), per_page=64)
    q, w = torch.randn(2, 2, DIM), torch.randn(2, 2)
    got = case.run(q, w, [0, 0], [4500, 4200])
    want = ((q @ case.keys[0].T).relu() * w[..., None]).sum(1)
    assert_close(got[0], want[0].double(), torch.float32)
    assert_close(got[1, :4200], want[1, :4200].double(), torch.float32)
    assert (got[1, 4200:] == -INF).all()


def test_strided_inputs() -> None:
    case = Case(CacheDtype.BF16)
    q, w = torch.randn(3, 2, DIM), torch.randn(3, 2)
    want = case.run(q, w, [0, 1, 1], [9, 6, 2])
    wide_table = torch.full((2, 9), -5, dtype=torch.int32)
    wide_table[:, 3:7] = case.block_table
    case.block_table = wide_table[:, 3:7]
    got = case.run(column_slice(q), column_slice(w), [0, 1, 1], [9, 6, 2])
    assert torch.equal(got, want)


def test_empty_shapes() -> None:
    case = Case(CacheDtype.FP8)
    assert case.run(torch.zeros(0, 2, DIM), torch.zeros(0, 2), [], []).shape == (0, 0)
    assert case.run(torch.zeros(2, 2, DIM), torch.zeros(2, 2), [0, 1], [0, 0]).shape == (2, 0)


def test_contract() -> None:
    case = Case(CacheDtype.FP8)
    q, w = torch.zeros(1, 2, DIM), torch.zeros(1, 2)
    with pytest.raises(KernelContractError, match="block table"):
        case.run(q, w, [0], [17])
    with pytest.raises(KernelContractError, match="w"):
        case.run(q, w.half(), [0], [1])
    with pytest.raises(KernelContractError, match="num_entries"):
        case.run(q, w, [0], [1, 1])
    with pytest.raises(KernelContractError, match="row_seq"):
        case.run(q, w, [0, 0], [1])
    with pytest.raises(KernelContractError, match="index entries of 64"):
        case.run(q[..., :64], w, [0], [1])
    case.layout = latent_layout(CacheDtype.FP8, DIM, 4)
    with pytest.raises(KernelContractError, match="latent entries"):
        case.run(q, w, [0], [1])


@pytest.mark.benchmark
def test_benchmark() -> None:
    case = Case(CacheDtype.FP8, counts=(8192,), per_page=64)
    q, w = torch.randn(128, 64, DIM).bfloat16(), torch.randn(128, 64)
    report(
        "index_score 128x64 heads x 8192 entries",
        lambda: case.run(q, w, [0] * 128, [8192] * 128),
        repeats=2,
    )
