"""``linear`` over all weight formats, whole and sliced, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    KernelContractError,
    PreparedWeight,
    block_amax,
    dequant_fp4,
    dequant_fp8,
    fake_quant_fp8,
    linear,
    pack_fp4,
    prepare_weight,
    quant_fp8_weight,
)
from tests.helpers.strided import column_slice, microseconds

FORMATS = ("fp8", "fp4", "bf16", "fp32")


def make(kind: str, n: int, k: int) -> tuple[BlockWeight, Tensor]:
    """A weight and its exact values in float64."""
    w = torch.randn(n, k) * 0.05
    if kind == "fp8":
        data, scale = quant_fp8_weight(w)
        return BlockWeight(data, scale), dequant_fp8(data, scale).double()
    if kind == "fp4":
        packed, scale = pack_fp4(w)
        return BlockWeight(packed, scale), dequant_fp4(packed, scale).double()
    plain = w.bfloat16() if kind == "bf16" else w
    return BlockWeight(plain), plain.double()


def close(got: Tensor, want: Tensor, dtype: torch.dtype, size: Tensor) -> None:
    """One rounding of the result, plus float32 accumulation noise of the summed magnitudes."""
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    bound = want.abs() * step + size * 2.0**-20
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_product(kind: str, dtype: torch.dtype, quantize: bool) -> None:
    block, w = make(kind, 70, 288)
    x = torch.randn(9, 288).to(dtype)
    rounds = quantize and kind in ("fp8", "fp4")
    x_in = fake_quant_fp8(x, 128) if rounds else x
    want, size = x_in.double() @ w.t(), x_in.double().abs() @ w.abs().t()
    weight = prepare_weight(block)
    got = linear(x, weight, quantize=quantize)
    assert got.dtype == dtype
    close(got, want, dtype, size)
    close(linear(column_slice(x), weight, quantize=quantize), want, dtype, size)
    wide = linear(x, weight, quantize=quantize, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    close(wide, want, torch.float32, size)
    assert torch.equal(wide.to(dtype), got)
    if rounds:
        assert not torch.equal(linear(x, weight, quantize=False), got)


def test_leading_dimensions_and_zero_rows() -> None:
    weight = prepare_weight(make("fp8", 40, 160)[0])
    x = torch.randn(2, 3, 160)
    flat = linear(x.flatten(0, 1), weight, quantize=True)
    torch.testing.assert_close(linear(x, weight, quantize=True).flatten(0, 1), flat)
    assert linear(x[:0], weight, quantize=True).shape == (0, 3, 40)
    assert linear(x[0, 0], weight, quantize=False).shape == (40,)


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_and_cols_are_views_that_keep_the_block_alignment(kind: str) -> None:
    block, w = make(kind, 300, 320)
    weight = prepare_weight(block)
    part = weight.rows(70, 270).rows(60, 190).cols(96, 300).cols(5, 200)
    assert torch.equal(part.matrix.double(), w[130:260, 101:296])
    assert part.matrix.untyped_storage().data_ptr() == weight.matrix.untyped_storage().data_ptr()
    assert (part.row_offset, part.col_offset) == (2, 101)
    assert (part.out_features, part.in_features) == (130, 195)


def test_a_checkpoint_slice_equals_the_view_of_the_whole() -> None:
    """A rank that reads rows 130..290 and columns 200..320 prepares what a view of all would be."""
    block, _ = make("fp8", 300, 320)
    assert block.scale is not None
    sliced = BlockWeight(
        block.data[130:290, 200:320], block.scale[1:3, 1:3], row_offset=2, col_offset=72
    )
    got = prepare_weight(sliced)
    want = prepare_weight(block).rows(130, 290).cols(200, 320)
    assert torch.equal(got.matrix, want.matrix)
    assert (got.row_offset, got.col_offset) == (want.row_offset, want.col_offset)
    assert got.kind is want.kind


@pytest.mark.parametrize("cut", [64, 128, 200])
def test_column_slices_with_shared_maxima_sum_to_the_whole(cut: int) -> None:
    """Tensor parallel over columns: same rounding as one rank, also when the cut splits a block."""
    block, _ = make("fp8", 50, 320)
    weight = prepare_weight(block)
    x = torch.randn(7, 320, dtype=torch.bfloat16) * torch.exp2(torch.arange(320) / 20)
    x = x.bfloat16()
    peaks = block_amax(x, 128)
    left, right = weight.cols(0, cut), weight.cols(cut, 320)
    first = right.col_offset
    assert block_amax(x[:, cut:], 128, first).shape == (7, 3 - cut // 128)
    parts = linear(
        x[:, :cut], left, quantize=True, amax=peaks[:, : -(-cut // 128)], out_dtype=torch.float32
    ) + linear(
        x[:, cut:], right, quantize=True, amax=peaks[:, cut // 128 :], out_dtype=torch.float32
    )
    whole = linear(x, weight, quantize=True, out_dtype=torch.float32)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_amax_is_used() -> None:
    weight = prepare_weight(make("fp8", 8, 128)[0])
    x = torch.randn(3, 128)
    plain = linear(x, weight, quantize=True)
    peaks = block_amax(x, 128)
    assert torch.equal(linear(x, weight, quantize=True, amax=peaks), plain)
    assert not torch.equal(linear(x, weight, quantize=True, amax=peaks * 16), plain)


def test_prepared_values_are_exact_in_bf16() -> None:
    for kind in ("fp8", "fp4"):
        values = prepare_weight(make(kind, 64, 128)[0]).matrix
        assert torch.equal(values.bfloat16().float(), values)


def test_contract_errors() -> None:
    block, _ = make("fp8", 64, 128)
    weight = prepare_weight(block)
    with pytest.raises(KernelContractError, match=r"linear: x: expected 128 columns.*\[2, 127\]"):
        linear(torch.zeros(2, 127), weight, quantize=False)
    with pytest.raises(KernelContractError, match=r"linear: x.*float16"):
        linear(torch.zeros(2, 128, dtype=torch.float16), weight, quantize=False)
    with pytest.raises(KernelContractError, match=r"linear: amax.*\[2, 1\].*\[2, 2\]"):
        linear(torch.zeros(2, 128), weight, quantize=True, amax=torch.zeros(2, 2))
    with pytest.raises(KernelContractError, match="out_dtype"):
        linear(torch.zeros(2, 128), weight, quantize=False, out_dtype=torch.float16)
    with pytest.raises(KernelContractError, match="expected one for e4m3"):
        prepare_weight(BlockWeight(block.data))
    with pytest.raises(KernelContractError, match="expected one for e4m3"):
        prepare_weight(BlockWeight(torch.zeros(2, 2), torch.zeros(1, 1, dtype=torch.uint8)))
    with pytest.raises(KernelContractError, match=r"col_offset.*128"):
        prepare_weight(BlockWeight(block.data, block.scale, 0, 128))
    with pytest.raises(KernelContractError, match=r"scale_u8.*\[1, 2\]"):
        prepare_weight(BlockWeight(block.data, block.scale, 0, 1))
    fp4 = make("fp4", 4, 32)[0]
    with pytest.raises(KernelContractError, match="row_offset: expected 0 for FP4"):
        prepare_weight(BlockWeight(fp4.data, fp4.scale, row_offset=1))
    with pytest.raises(KernelContractError, match=r"rows.*60:65"):
        weight.rows(60, 65)
    assert isinstance(weight.cols(3, 3), PreparedWeight)


@pytest.mark.benchmark
def test_benchmark_linear() -> None:
    weight = prepare_weight(make("fp8", 1024, 4096)[0])
    x = torch.randn(32, 4096, dtype=torch.bfloat16)
    print(f"linear 32x4096x1024: {microseconds(lambda: linear(x, weight, quantize=True)):.0f} us")
