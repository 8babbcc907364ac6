"""Optional backends on the GPU: against the twins with the ops' bounds, and against the own kernels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import pytest
import torch

from kernels import (
    BlockWeight,
    CacheDtype,
    EntryPages,
    QuantRows,
    WindowRing,
    grouped_output_quant,
    hc_pre_norm,
    linear_swiglu_quant,
    quant_fp8_weight,
    quant_rows,
    rms_norm_quant,
    swiglu_quant,
)
from kernels.backend import DEEP_GEMM, FLASH_MLA, Backend
from kernels.linear.cuda_impl import prepare_weight
from kernels.quant_gemm import cuda_impl as own_gemm
from kernels.quant_gemm.pieces import FASTER, TALLEST, piece_height
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
    heights = FASTER[n, k]
    x = torch.randn(2 * TALLEST + heights[-1] + 77, k, device="cuda")
    for count in (*heights, 3 * heights[-1], heights[-1] + 5, x.shape[0], heights[-1] - 1, 0):
        rows = quant_rows(x[:count])
        with pieces_of(gemm) as multiplied:
            got = gemm.linear_quant(rows, w, out_dtype=torch.bfloat16)
        height = piece_height(count, k, x.device)
        assert multiplied == ([height] * (count // height) if height else [])
        assert (height is None) == (
            (count % heights[-1] != 0 and count < 2 * TALLEST) or count == 0
        )
        assert torch.equal(got, own_gemm.linear_quant(rows, w, out_dtype=torch.bfloat16))
    part = quant_rows(x[: heights[-1]])
    got = gemm.linear_quant(part, w, out_dtype=torch.bfloat16)
    want = part.values().double() @ w.matrix.double().t()
    assert float((got.double() - want).norm() / want.norm()) < GEMM_BOUND


def test_what_deep_gemm_does_not_take_goes_to_the_own_kernel() -> None:
    gemm = implementation("kernels.quant_gemm.deep_gemm_impl", DEEP_GEMM)
    n, k = 4096, 4096
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda"))))
    rows = quant_rows(torch.randn(FASTER[n, k][-1], k, device="cuda"))
    part = QuantRows(q=rows.q, scale=rows.scale)  # as a slice of rows, or rows of another rank
    want = rows.values().double() @ w.matrix.double().t()
    with pieces_of(gemm) as multiplied:
        for some, weight, dtype in (
            (part, w, torch.bfloat16),
            (rows, w, torch.float32),
            (rows, w.rows(0, n // 2), torch.bfloat16),
            (rows, w.rows(5, n), torch.bfloat16),
        ):
            got = gemm.linear_quant(some, weight, out_dtype=dtype)
            first = weight.row_offset
            assert error(got, want[:, first : first + weight.out_features]) < GEMM_BOUND
    assert not multiplied


@pytest.mark.parametrize("k", [3072, 7168])
@pytest.mark.parametrize("more", [0, 700])
def test_makers_of_rows_write_scales_by_columns(k: int, more: int) -> None:
    implementation("kernels.quant_gemm.deep_gemm_impl", DEEP_GEMM)
    count = TALLEST * (2 if more else 1) + more
    x = torch.randn(count, 2 * k, device="cuda") * torch.exp2(torch.randn(count, 1, device="cuda"))
    x[7, 300] = float("nan")
    narrow, weight = x.bfloat16(), torch.rand(k, device="cuda")
    gate_up = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(2 * k, 256, device="cuda"))))
    made = {
        "quant_rows": quant_rows(narrow[:, :k]),
        "of float32": quant_rows(x[:, :k]),
        "of odd columns": quant_rows(x[:, 1 : k + 1]),
        "rms_norm_quant": rms_norm_quant(narrow[:, :k], weight, 1e-6)[1],
        "swiglu_quant": swiglu_quant(narrow[:, :k], narrow[:, k:], limit=10.0),
        "linear_swiglu_quant": linear_swiglu_quant(
            quant_rows(narrow[:, :256]), gate_up, limit=10.0, hidden_dtype=torch.bfloat16
        ),
    }
    if k == 7168:
        streams = torch.randn(count, 4, k, device="cuda").bfloat16()
        mix = torch.randn(24, 4 * k, device="cuda") * 0.01
        scale, base = torch.rand(3, device="cuda"), torch.rand(24, device="cuda")
        made["hc_pre_norm"] = hc_pre_norm(
            streams, mix, scale, base, weight, iters=20, eps=1e-6, norm_eps=1e-6, rms_eps=1e-6
        )[1]
    for name, rows in made.items():
        check_columns(name, rows, more)


def test_the_grouped_output_writes_scales_by_columns() -> None:
    implementation("kernels.quant_gemm.deep_gemm_impl", DEEP_GEMM)
    count = 2 * TALLEST + 700
    o = torch.randn(count, 16, 512, device="cuda").bfloat16()
    wo_a = prepare_weight(BlockWeight(torch.randn(8192, 1024, device="cuda").bfloat16() * 0.03))
    positions = torch.arange(count, device="cuda")
    inv_freq = 10_000.0 ** -(torch.arange(32, device="cuda") / 32)
    check_columns("rows", grouped_output_quant(o, positions, inv_freq, wo_a, 8), 700)


def check_columns(name: str, rows: QuantRows, more: int) -> None:
    """Every row's float32 scales are those of its bytes, in pieces, the last one not whole."""
    assert rows.scale_columns is not None, name
    pieces, blocks, height = rows.scale_columns.shape
    assert (pieces, blocks) == (3 if more else 1, rows.scale.shape[1]), name
    by_rows = rows.scale_columns.transpose(1, 2).reshape(pieces * height, blocks)[: rows.shape[0]]
    bits = (rows.scale.int() << 23).masked_fill(rows.scale == 255, 0x7FC00000)
    assert torch.equal(by_rows.contiguous().view(torch.int32), bits), name


@contextmanager
def pieces_of(gemm: ModuleType) -> Iterator[list[int]]:
    """Heights of the pieces that DeepGEMM multiplies inside."""
    seen: list[int] = []
    multiply = gemm.multiply

    def counted(q: torch.Tensor, *args: torch.Tensor) -> None:
        seen.append(q.shape[0])
        multiply(q, *args)

    with mock.patch.object(gemm, "multiply", counted):
        yield seen


def test_deep_gemm_reads_neither_padding_nor_other_rows() -> None:
    gemm = implementation("kernels.quant_gemm.deep_gemm_impl", DEEP_GEMM)
    n, k = 4096, 4096
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda"))))
    height = FASTER[n, k][-1]
    rows = quant_rows(torch.randn(height, k, device="cuda"))
    want = gemm.linear_quant(rows, w, out_dtype=torch.bfloat16)
    wide = torch.full((height + 200, k + 64), 0x7F, dtype=torch.uint8, device="cuda")
    scale = torch.full((height + 200, 32), 0xFF, dtype=torch.uint8, device="cuda")
    columns = torch.full((3, k // 128, height), float("nan"), device="cuda")
    wide[:height, :k] = rows.q.view(torch.uint8)
    scale[:height, : k // 128] = rows.scale
    assert rows.scale_columns is not None
    columns[1] = rows.scale_columns[0]
    poisoned = QuantRows(
        q=wide.view(torch.float8_e4m3fn)[:height, :k],
        scale=scale[:height, : k // 128],
        scale_columns=columns[1:2],
    )
    with pieces_of(gemm) as multiplied:
        got = gemm.linear_quant(poisoned, w, out_dtype=torch.bfloat16)
    assert multiplied == [height]
    assert torch.equal(got, want)
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
