"""Indexer kernels on the GPU against the float32 twin on the same values, and their bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind
from kernels.index_score import cuda_impl, reference
from kernels.index_topk import cuda_impl as fused
from kernels.quant.reference import fake_quant_fp4
from kernels.topk.reference import topk_select
from tests.kernels.attention_gpu import error, layout, random_pool, random_table

pytestmark = pytest.mark.gpu
BOUND = 1e-3  # the tensor cores add fp8 products with fewer bits than f32 has

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    rows: int,
    *,
    seqs: int = 3,
    blocks: int = 20,
    per_page: int = 64,
    fp4: bool = True,
    pad: int = 0,
    run: int = 1,
) -> Inputs:
    """q, w, pool, block_table, row_seq, num_entries; sequences in runs of ``run`` rows."""
    q = torch.randn(rows, 64, 128, device="cuda").to(torch.bfloat16)
    q *= torch.exp2(torch.randint(-6, 7, (rows, 64, 1), device="cuda")).to(torch.bfloat16)
    if fp4:
        q = fake_quant_fp4(q)
    w = torch.randn(rows, 64, device="cuda")
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, per_page)
    pool = random_pool(shape, seqs * blocks + 3, pad)
    table = random_table(seqs, blocks, pool.shape[0], holes=True)
    row_seq = torch.arange(rows, device="cuda") // run % seqs
    row_seq[5::17] = -1
    num = torch.randint(0, blocks * per_page + 1, (rows,), device="cuda")
    num[3::11] = 0
    return q, w, pool, table, row_seq, num


def scores(args: Inputs, per_page: int, rows: slice = slice(None)) -> Tensor:
    q, w, pool, table, row_seq, num = args
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, per_page)
    return cuda_impl.index_score(q[rows], w[rows], pool, shape, table, row_seq[rows], num[rows])


def twin(args: Inputs, per_page: int) -> Tensor:
    q, w, pool, table, row_seq, num = args
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, per_page)
    return reference.index_score(q.float(), w, pool, shape, table, row_seq, num)


@pytest.mark.parametrize("rows", [1, 7, 32, 50, 333, 900, 1200, 2117])
@pytest.mark.parametrize("run", [1, 4, 150])
@pytest.mark.parametrize("fp4", [True, False])
def test_scores(rows: int, run: int, fp4: bool) -> None:
    args = inputs(rows, run=run, fp4=fp4)
    got, want = scores(args, 64), twin(args, 64)
    assert got.shape == want.shape
    assert error(got, want) < BOUND
    assert got.stride(0) % 256 == 0
    assert got.stride(0) > got.shape[1]


@pytest.mark.parametrize("rows", [5, 21, 300])
@pytest.mark.parametrize(("per_page", "pad"), [(1, 4), (16, 0), (48, 16), (100, 8)])
def test_page_sizes_and_odd_addresses(per_page: int, pad: int, rows: int) -> None:
    args = inputs(rows, per_page=per_page, blocks=7, pad=pad, run=3)
    assert error(scores(args, per_page), twin(args, per_page)) < BOUND


@pytest.mark.parametrize("run", [1, 40])
def test_a_row_has_the_same_bits_in_any_batch(run: int) -> None:
    """Alone, among few (4 rows a block) and among many (8), beside rounded and unrounded queries."""
    args = inputs(1100, run=run)
    args[0][::13] = torch.randn(64, 128, device="cuda").to(torch.bfloat16)
    many = scores(args, 64)
    for part in (slice(0, 1), slice(14, 15), slice(26, 27), slice(100, 231), slice(600, 1100)):
        few = scores(args, 64, part)
        assert torch.equal(few, many[part, : few.shape[1]])


def test_strided_rows_and_no_rows() -> None:
    q, w, pool, table, row_seq, num = inputs(40)
    wide = torch.full((40, 70, 136), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[:, 2:66, 8:] = q
    args = (wide[:, 2:66, 8:], w, pool, table, row_seq, num)
    assert torch.equal(scores(args, 64), scores((q, w, pool, table, row_seq, num), 64))
    assert scores(inputs(0), 64).shape == (0, 0)


@pytest.mark.parametrize("rows", [3, 90])
@pytest.mark.parametrize("k", [1, 512, 1024])
def test_fused_selection(rows: int, k: int) -> None:
    q, w, pool, table, row_seq, num = args = inputs(rows, run=2)
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, 64)
    got = fused.index_topk(q, w, pool, shape, table, row_seq, num, k)
    assert torch.equal(got, topk_select(scores(args, 64), k))


def test_head_weights_are_rounded_and_scaled() -> None:
    """``head_scale`` on raw products in a wider row: the scores of weights rounded and scaled before."""
    q, w, pool, table, row_seq, num = inputs(90)
    shape, scale = layout(EntryKind.INDEX, CacheDtype.FP8, 64), 0.0110485
    raw = torch.full((90, 80), torch.nan, device="cuda")[:, 7:71]
    raw.copy_(w)
    args = (pool, shape, table, row_seq, num)
    found = []
    for weights, factor in ((raw, scale), (w.bfloat16().float() * scale, None)):
        out = torch.full((90, 64 * table.shape[1]), torch.nan, device="cuda")
        cuda_impl.score_into(out, q, weights, *args, fill=True, head_scale=factor)
        found.append(out)
    assert torch.equal(*found)
