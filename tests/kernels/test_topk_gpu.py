"""Selection on the GPU: exactly the indices of the torch twin, whatever the rows hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.topk import cuda_impl, reference

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")


def same(scores: Tensor, k: int, start: Tensor | None = None, end: Tensor | None = None) -> None:
    got = cuda_impl.topk_select(scores, k, start, end)
    want = reference.topk_select(scores, k, start, end)
    assert got.dtype is torch.int32
    assert torch.equal(got, want)


def special(rows: int, columns: int) -> Tensor:
    """Scores with NaN, infinities, both zeros, subnormals and ties among them."""
    scores = torch.randn(rows, columns, device="cuda")
    odd = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, 2.0], device="cuda")
    pick = torch.randint(0, 70, (rows, columns), device="cuda")
    return torch.where(pick < 7, odd[pick.clamp(max=6)], scores)


@pytest.mark.parametrize("k", [1, 5, 512, 1024, 2048, 5000])
@pytest.mark.parametrize("columns", [1, 31, 700, 8191, 8193, 40001, 70000])
def test_random_and_special_rows(columns: int, k: int) -> None:
    same(torch.randn(3, columns, device="cuda"), k)
    same(special(3, columns), k)


@pytest.mark.parametrize("rows", [3, 20, 300])
@pytest.mark.parametrize(
    "columns", [2048, 2049, 4097, 8192, 9001, 16384, 16385, 24576, 32768, 32769]
)
def test_rows_that_registers_hold(columns: int, rows: int) -> None:
    """Up to the last column that a block's or a cluster's threads hold, and one more."""
    scores = torch.randn(rows, columns, device="cuda")
    same(scores, 512)
    same(special(rows, columns), 1024)
    same(torch.randint(0, 9, (rows, columns), device="cuda").float(), 512)  # bins of equal scores
    same(torch.randint(0, 1000, (rows, columns), device="cuda").float(), 700)
    scores[:, ::1000] *= 1e6  # the rest shares a few bins
    same(scores, 512)
    scores[:, 77] = INF
    same(scores, 512)


def test_lengths_within_a_wide_table() -> None:
    lengths = [0, 1, 511, 512, 513, 2048, 4096, 4097, 8192, 8193, 20000, 32768, 32769, 40000, 65536]
    for columns in (65536, 131072):
        for rows in (2, len(lengths), 5 * len(lengths)):
            end = torch.tensor(lengths * 5, device="cuda")[torch.randperm(5 * len(lengths))[:rows]]
            same(torch.randn(rows, columns, device="cuda"), 512, None, end)


@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_long_rows(rows: int) -> None:
    same(torch.randn(rows, 262144, device="cuda"), 512)
    same(torch.randn(rows, 262144, device="cuda").sort(dim=1).values, 1024)


def test_rows_longer_than_the_bitmap() -> None:
    same(torch.randn(2, 300001, device="cuda"), 512)
    same(torch.randint(0, 3, (1, 300001), device="cuda").float(), 2048)


@pytest.mark.parametrize("columns", [9000, 65536, 200000])
@pytest.mark.parametrize("rows", [2, 64])
def test_ties_and_peaks_defeat_no_path(columns: int, rows: int) -> None:
    """All equal; two values; one hot stretch that the sample misses; nearly nothing visible."""
    same(torch.zeros(rows, columns, device="cuda"), 512)
    same(torch.randint(0, 2, (rows, columns), device="cuda").float(), 512)
    hot = torch.randn(rows, columns, device="cuda")
    hot[:, 100:3000] += 50
    same(hot, 1024)
    few = torch.full((rows, columns), -INF, device="cuda")
    few[:, 17:300] = 1.0
    same(few, 512)


def test_padded_rows_vllm_42169() -> None:
    for width in (255, 256, 9001, 65536):
        padded = torch.full((5, 256 * (width // 256 + 1)), INF, device="cuda")
        padded[:, :width] = torch.randn(5, width, device="cuda")
        same(padded[:, :width], 512)
        same(padded[:, 1:width], 512)  # rows that start at odd addresses


def test_row_ranges() -> None:
    scores = special(9, 50000)
    start = torch.tensor([0, 5, 49999, 50000, 100, 30000, -3, 7, 20000], device="cuda")
    end = torch.tensor([50000, 5, 50000, 60000, 50, 30900, 40000, 8, 50000], device="cuda")
    same(scores, 512, start, end)
    same(scores, 512, None, end)
    same(scores, 512, start, None)


def test_a_row_alone_and_among_many() -> None:
    scores = special(300, 30000)
    many = cuda_impl.topk_select(scores, 512)
    for row in (0, 7, 299):
        assert torch.equal(cuda_impl.topk_select(scores[row : row + 1], 512)[0], many[row])
    assert torch.equal(cuda_impl.topk_select(scores, 512), many)


def test_many_rows_and_none() -> None:
    same(torch.randn(66000, 64, device="cuda"), 16)
    same(torch.randn(0, 64, device="cuda"), 16)
    same(torch.randn(4, 64, device="cuda"), 0)


@pytest.mark.parametrize("k", [1, 512, 2048])
@pytest.mark.parametrize("columns", [0, 1, 512, 2048, 4095, 8192, 9000])
def test_merge(columns: int, k: int) -> None:
    values = special(4, columns) if columns else torch.empty(4, 0, device="cuda")
    indices = torch.stack([torch.randperm(10 * columns + 1)[:columns] for _ in range(4)])
    indices = indices.to("cuda", torch.int32)
    indices[:, ::7] = -1
    got = cuda_impl.topk_merge(values, indices, k)
    assert torch.equal(got, reference.topk_merge(values, indices, k))
