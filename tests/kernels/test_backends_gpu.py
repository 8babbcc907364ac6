"""Optional backends on the GPU: against the twins with the ops' bounds, and against the own kernels."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import pytest
import torch

from kernels import (
    BlockWeight,
    CacheDtype,
    EntryPages,
    QuantRows,
    WindowRing,
    quant_fp8_weight,
    quant_rows,
)
from kernels.backend import DEEP_GEMM, FLASH_MLA, Backend
from kernels.linear.cuda_impl import prepare_weight
from kernels.quant_gemm import cuda_impl as own_gemm
from kernels.sparse_attention import cuda_impl as own_attention
from kernels.sparse_attention import reference as attention_reference
from tests.kernels.attention_gpu import error, random_entries, random_ring

pytestmark = pytest.mark.gpu
GEMM_BOUND, O_BOUND, LSE_BOUND = 3e-3, 4e-3, 1e-4
SCALE = 512**-0.5
ROW_FIELDS = ("row_seq", "index", "num_entries")


def implementation(module: str, backend: Backend) -> ModuleType:
    """The module, or a skip where the package is not installed in its pinned version."""
    if not backend.usable():
        pytest.skip(f"{backend} is not installed (found: {backend.found()})")
    return importlib.import_module(module)


@pytest.mark.parametrize(("n", "k"), [(2048, 7168), (4096, 4096), (4096, 8192)])
def test_deep_gemm_products_have_the_own_kernels_bits(n: int, k: int) -> None:
    gemm = implementation("kernels.quant_gemm.deep_gemm_impl", DEEP_GEMM)
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda"))))
    heights = gemm.FASTER[n, k]
    whole = quant_rows(torch.randn(heights[0] + heights[-1] + 77, k, device="cuda"))
    for count in (heights[0], heights[-1] + 5, whole.shape[0], heights[-1] - 1, 0):
        rows = QuantRows(q=whole.q[:count], scale=whole.scale[:count])
        got = gemm.linear_quant(rows, w, out_dtype=torch.bfloat16)
        assert torch.equal(got, own_gemm.linear_quant(rows, w, out_dtype=torch.bfloat16))
    part = QuantRows(q=whole.q[: heights[-1]], scale=whole.scale[: heights[-1]])
    got = gemm.linear_quant(part, w, out_dtype=torch.bfloat16)
    want = part.values().double() @ w.matrix.double().t()
    assert float((got.double() - want).norm() / want.norm()) < GEMM_BOUND
    half = gemm.linear_quant(part, w.rows(0, n // 2), out_dtype=torch.float32)
    assert error(half, want[:, : n // 2]) < GEMM_BOUND


def test_deep_gemm_reads_neither_padding_nor_other_rows() -> None:
    gemm = implementation("kernels.quant_gemm.deep_gemm_impl", DEEP_GEMM)
    n, k = 4096, 4096
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda"))))
    height = gemm.FASTER[n, k][-1]
    rows = quant_rows(torch.randn(height, k, device="cuda"))
    wide = torch.full((height + 200, k + 64), 0x7F, dtype=torch.uint8, device="cuda")
    scale = torch.full((height + 200, 32), 0xFF, dtype=torch.uint8, device="cuda")
    wide[:height, :k] = rows.q.view(torch.uint8)
    scale[:height, : k // 128] = rows.scale
    poisoned = QuantRows(
        q=wide.view(torch.float8_e4m3fn)[:height, :k], scale=scale[:height, : k // 128]
    )
    got = gemm.linear_quant(poisoned, w, out_dtype=torch.bfloat16)
    assert torch.equal(got, gemm.linear_quant(rows, w, out_dtype=torch.bfloat16))
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("topk", [40, 512, 1000])
@pytest.mark.parametrize("holes", [False, True])
def test_flash_mla_decode(heads: int, topk: int, holes: bool) -> None:
    mla = implementation("kernels.sparse_attention.flash_mla_impl", FLASH_MLA)
    rows = mla.FASTER_FROM[heads] + 2
    entries = random_entries(rows, seqs=3, blocks=20, per_page=64, topk=topk, holes=holes)
    ring = random_ring(rows, 128, CacheDtype.FP8)
    ring.slots[2:4] = -1  # with and without entries
    entries.num_entries[3] = 0
    q = 3 * torch.randn(rows, heads, 512, device="cuda", dtype=torch.bfloat16)
    few = dataclasses.replace(ring, slots=ring.slots[:, :100].contiguous())
    sinks = (torch.randn(heads, device="cuda"), None)
    for window, chosen, sink in (
        (ring, entries, sinks[0]),
        (few, entries, sinks[0]),
        (None, entries, sinks[1]),
        (ring, entries, sinks[1]),
    ):
        assert mla.serves(q, window, chosen, SCALE)
        for _ in range(2):  # the second call finds the plan of the first
            got = mla.sparse_attention(q, window, chosen, sink=sink, scale=SCALE)
        want = attention_reference.sparse_attention(
            q.float(), window, chosen, sink=sink, scale=SCALE
        )
        assert error(got[0], want[0]) < O_BOUND
        assert error(got[1], want[1]) < LSE_BOUND
        empty = want[1] == -torch.inf
        assert (got[0][empty] == 0).all()


def test_what_flash_mla_does_not_take_goes_to_the_own_kernel() -> None:
    mla = implementation("kernels.sparse_attention.flash_mla_impl", FLASH_MLA)
    rows = mla.FASTER_FROM[64]
    chosen = random_entries(rows, seqs=2, blocks=3, per_page=64, topk=40)
    every = dataclasses.replace(chosen, index=None)
    fp8, bf16 = (random_ring(rows, 128, x) for x in (CacheDtype.FP8, CacheDtype.BF16))
    few = dataclasses.replace(chosen, **{n: getattr(chosen, n)[:5] for n in ROW_FIELDS})
    calls: list[tuple[int, int, WindowRing, EntryPages | None]] = [
        (rows, 64, bf16, chosen),
        (rows, 64, fp8, every),
        (rows, 64, fp8, None),
        (rows, 16, fp8, chosen),
        (5, 64, dataclasses.replace(fp8, slots=fp8.slots[:5]), few),
    ]
    for count, heads, window, pages in calls:
        q = torch.randn(count, heads, 512, device="cuda", dtype=torch.bfloat16)
        assert not mla.serves(q, window, pages, SCALE)
        got = mla.sparse_attention(q, window, pages, sink=None, scale=SCALE)
        own = own_attention.sparse_attention(q, window, pages, sink=None, scale=SCALE)
        assert torch.equal(got[0], own[0])
        assert torch.equal(got[1], own[1])
