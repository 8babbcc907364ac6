"""Rounding steps and weight formats against tables of every representable value."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import (
    KernelContractError,
    act_quant,
    block_amax,
    dequant_fp4,
    dequant_fp8,
    fake_quant_fp4,
    fake_quant_fp8,
    pack_fp4,
    quant_fp8_weight,
)
from tests.helpers.strided import column_slice, microseconds


def e4m3_values() -> list[float]:
    """Value of the codes 0..126; 127 is NaN."""
    values = [m * 2.0**-9 for m in range(8)]
    values += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
    return values[:127]


E4M3 = e4m3_values()
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(magnitude: float, table: list[float]) -> float:
    """Nearest table value; a tie goes to the even code."""
    best = min(range(len(table)), key=lambda c: (abs(table[c] - magnitude), c % 2))
    return table[best]


def power_above(amax: float, floor: float, top: float) -> float:
    """2^ceil(log2(max(amax, floor) / top)), the division as a float32 product with 1/top."""
    ratio = np.float32(max(np.float32(amax), np.float32(floor))) * np.float32(1 / top)
    fraction, exponent = math.frexp(float(ratio))
    return 2.0 ** (exponent - 1 if fraction == 0.5 else exponent)


def rounded_row(
    row: list[float], block: int, floor: float, table: list[float], offset: int = 0
) -> list[float]:
    """The rounding rule for one row, value by value."""
    top, out = table[-1], list(row)
    first = 0
    while first < len(row):
        last = min(len(row), first + block - (offset + first) % block)
        scale = power_above(max(abs(v) for v in row[first:last]), floor, top)
        for i in range(first, last):
            magnitude = nearest(min(abs(row[i]) / scale, top), table) * scale
            out[i] = math.copysign(magnitude, row[i])
        first = last
    return out


def rounded(x: Tensor, block: int, floor: float, table: list[float], offset: int = 0) -> Tensor:
    rows = x.double().reshape(-1, x.shape[-1]).tolist()
    out = [rounded_row(row, block, floor, table, offset) for row in rows]
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape)


def spread(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Values over many magnitudes, with zeros."""
    x = torch.randn(rows, cols) * torch.exp2(torch.randint(-12, 12, (rows, cols)).float())
    return x.masked_fill(torch.rand(rows, cols) < 0.05, 0.0).to(dtype)


def test_torch_rounds_to_e4m3_to_nearest_even() -> None:
    """The base of every FP8 step: all values, all midpoints and their neighbours, 1.99."""
    probes = [*E4M3, 1.99, 2.0**-10, 2.0**-11, 1.5 * 2.0**-10]
    for a, b in itertools.pairwise(E4M3):
        middle = np.float32((a + b) / 2)
        probes += [float(np.nextafter(middle, np.float32(s))) for s in (-1.0, 1e9)] + [
            float(middle)
        ]
    x = torch.tensor(probes)
    want = torch.tensor([nearest(p, E4M3) for p in probes])
    assert torch.equal(x.to(torch.float8_e4m3fn).float(), want)
    assert torch.equal((-x).to(torch.float8_e4m3fn).float(), -want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("block", "cols", "offset"), [(128, 256, 0), (64, 448, 0), (128, 200, 0), (128, 200, 72)]
)
def test_fake_quant_fp8_is_the_exact_rule(
    dtype: torch.dtype, block: int, cols: int, offset: int
) -> None:
    x = spread(6, cols, dtype)
    got = fake_quant_fp8(x, block, col_offset=offset)
    assert got.dtype == dtype
    want = rounded(x, block, 1e-4, E4M3, offset)
    assert torch.equal(got.double(), want)
    assert torch.equal(fake_quant_fp8(column_slice(x), block, col_offset=offset), got)


def test_fp8_scale_at_its_edges() -> None:
    """Maxima at, just under and just over powers of two, the floor 1e-4, and tiny values."""
    peaks = [448.0 * 2.0**e for e in (-20, -3, 0, 1, 10)]
    peaks += [float(np.nextafter(np.float32(p), np.float32(s))) for p in peaks for s in (0, 1e9)]
    peaks += [0.0, 1e-30, 9.99e-5, 1e-4, 1.99, 3.4e38]
    x = torch.tensor(peaks).unsqueeze(1) * torch.tensor([1.0, -0.37, 0.031, 0.0])
    codes, scale = act_quant(x, 128)
    want = [[power_above(p, 1e-4, 448.0)] for p in torch.tensor(peaks).tolist()]
    assert torch.equal(scale.double(), torch.tensor(want, dtype=torch.float64))
    assert torch.equal(codes.double() * scale.double(), rounded(x, 128, 1e-4, E4M3))


def test_act_quant_is_the_stored_form() -> None:
    x = spread(5, 300, torch.bfloat16)
    codes, scale = act_quant(column_slice(x))
    assert codes.shape == x.shape
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 3)
    values = codes.float() * scale.repeat_interleave(128, 1)[:, :300]
    assert torch.equal(values.to(x.dtype), fake_quant_fp8(x, 128))


@pytest.mark.parametrize("cut", [1, 127, 128, 129, 200])
def test_block_maxima_of_a_cut_block(cut: int) -> None:
    """Two slices that share a block round as the whole when they share its maximum."""
    x = spread(4, 300, torch.float32)
    whole = fake_quant_fp8(x, 128)
    left, right = x[:, :cut], x[:, cut:]
    peaks = block_amax(x, 128)
    assert torch.equal(block_amax(left, 128), block_amax(x[:, :cut].clone(), 128, 256))
    right_peaks = block_amax(right, 128, cut)
    first = cut // 128
    assert right_peaks.shape == (4, 3 - first)
    assert (right_peaks <= peaks[:, first:]).all()
    parts = (
        fake_quant_fp8(left, 128, peaks[:, : -(-cut // 128)]),
        fake_quant_fp8(right, 128, peaks[:, first:], cut),
    )
    assert torch.equal(torch.cat(parts, 1), whole)


def test_an_amax_that_is_too_small_saturates() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.5]])
    got = fake_quant_fp8(x, 128, torch.tensor([[1.0]]))
    top = 448.0 * power_above(1.0, 1e-4, 448.0)
    assert got[0, :2].tolist() == [top, -top]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quant_fp4_is_the_exact_rule(dtype: torch.dtype) -> None:
    x = spread(8, 128, dtype)
    got = fake_quant_fp4(x)
    assert got.dtype == dtype
    assert torch.equal(got.double(), rounded(x, 32, 6 * 2.0**-126, E2M1))
    assert torch.equal(fake_quant_fp4(column_slice(x)), got)


def test_fp4_ties_go_to_the_even_mantissa() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    row = torch.tensor([[6.0, *ties, *(-t for t in ties), *([0.0] * 17)]])
    got = fake_quant_fp4(row)[0].tolist()
    assert got[1:8] == want
    assert got[8:15] == [-w for w in want]


def test_fp4_floor_keeps_zero_and_tiny_blocks_finite() -> None:
    x = torch.zeros(2, 32)
    x[1, 0] = 2.0**-127
    got = fake_quant_fp4(x)
    # The floor's scale is 2^-126, where 2^-127 is a code of its own.
    assert torch.equal(got, x)
    _, scale = pack_fp4(x)
    assert scale.tolist() == [[1], [1]]


def test_pack_fp4_round_trip_and_nibble_order() -> None:
    x = spread(6, 96, torch.float32)
    packed, scale = pack_fp4(column_slice(x))
    assert packed.dtype == torch.int8
    assert packed.shape == (6, 48)
    assert scale.shape == (6, 3)
    assert torch.equal(dequant_fp4(packed, scale), fake_quant_fp4(x))
    codes = torch.tensor([[0x2D] + [0] * 15], dtype=torch.uint8)  # low nibble 13 = -3, high 2 = 1
    values = dequant_fp4(codes, torch.tensor([[128]], dtype=torch.uint8))
    assert values[0, :3].tolist() == [-6.0, 2.0, 0.0]


def test_dequant_fp4_takes_every_code_and_strided_columns() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    scale = torch.arange(100, 116, dtype=torch.uint8).unsqueeze(1)
    signed = E2M1 + [-v for v in E2M1]
    want = torch.tensor(
        [
            [signed[n] * 2.0 ** (100 + r - 127) for b in row for n in (b % 16, b // 16)]
            for r, row in enumerate(codes.tolist())
        ]
    )
    assert torch.equal(dequant_fp4(codes.view(torch.int8), scale), want)
    wide = torch.zeros(16, 32, dtype=torch.int8)
    wide[:, 16:] = codes.view(torch.int8)
    assert torch.equal(dequant_fp4(wide[:, 16:], scale), want)


def test_dequant_fp8_of_slices_equals_slices_of_the_whole() -> None:
    data = torch.randn(300, 290).to(torch.float8_e4m3fn)
    scale = torch.randint(110, 140, (3, 3), dtype=torch.uint8)
    want = torch.stack(
        [
            data.double()[r]
            * torch.tensor([2.0 ** (int(scale[r // 128, c // 128]) - 127) for c in range(290)])
            for r in range(300)
        ]
    )
    assert torch.equal(dequant_fp8(data, scale).double(), want)
    for r0, r1, c0, c1 in ((0, 300, 0, 290), (130, 257, 100, 290), (5, 6, 255, 257)):
        part = dequant_fp8(
            data[r0:r1, c0:c1],
            scale[r0 // 128 : (r1 - 1) // 128 + 1, c0 // 128 : (c1 - 1) // 128 + 1],
            r0 % 128,
            c0 % 128,
        )
        assert torch.equal(part.double(), want[r0:r1, c0:c1])


def test_e8m0_bytes() -> None:
    data = torch.ones(1, 128 * 5).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0, 1, 127, 254, 255]], dtype=torch.uint8)
    got = dequant_fp8(data, scale)[0, ::128].tolist()
    assert got[:4] == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert math.isnan(got[4])


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 5), (0, 40)])
def test_quant_fp8_weight(shape: tuple[int, int]) -> None:
    w = spread(*shape, torch.float32)
    data, scale = quant_fp8_weight(column_slice(w))
    assert data.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    got = dequant_fp8(data, scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            want = rounded(block.reshape(1, -1), block.numel(), 1e-4, E4M3).reshape(block.shape)
            part = got[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            assert torch.equal(part.double(), want)
    again, same = quant_fp8_weight(got)
    assert torch.equal(dequant_fp8(again, same), got)


def test_nan_stays_in_its_block() -> None:
    x = torch.ones(2, 256)
    x[0, 3] = float("nan")
    for got, block in ((fake_quant_fp8(x, 128), 128), (fake_quant_fp4(x), 32)):
        assert got[0, :block].isnan().all()
        assert torch.equal(got[0, block:], x[0, block:])
        assert torch.equal(got[1], x[1])
    assert block_amax(x, 128)[0].isnan().tolist() == [True, False]


def test_zero_rows_and_leading_dimensions() -> None:
    empty = torch.zeros(0, 4, 160)
    assert fake_quant_fp8(empty, 128).shape == (0, 4, 160)
    assert fake_quant_fp4(empty).shape == (0, 4, 160)
    assert block_amax(empty, 128, 100).shape == (0, 4, 3)
    assert act_quant(empty)[1].shape == (0, 4, 2)
    assert pack_fp4(empty)[0].shape == (0, 4, 80)
    x = spread(6, 160, torch.float32)
    assert torch.equal(fake_quant_fp8(x.view(2, 3, 160), 128).flatten(0, 1), fake_quant_fp8(x, 128))


def test_contract_errors_name_the_argument() -> None:
    x = torch.zeros(2, 128)
    scale = torch.zeros(1, 1, dtype=torch.uint8)
    codes = x.to(torch.float8_e4m3fn)
    with pytest.raises(KernelContractError, match=r"fake_quant_fp8: x.*float16"):
        fake_quant_fp8(x.half(), 128)
    with pytest.raises(KernelContractError, match=r"fake_quant_fp8: amax.*\[2, 1\].*\[2, 2\]"):
        fake_quant_fp8(x, 128, torch.zeros(2, 2))
    with pytest.raises(KernelContractError, match="contiguous last dimension"):
        fake_quant_fp8(torch.zeros(128, 2).t(), 128)
    with pytest.raises(KernelContractError, match="block >= 1"):
        block_amax(x, 0)
    with pytest.raises(KernelContractError, match="multiples of 32"):
        fake_quant_fp4(torch.zeros(2, 40))
    with pytest.raises(KernelContractError, match=r"dequant_fp8: scale_u8.*\[1, 2\]"):
        dequant_fp8(codes, scale, 0, 1)
    with pytest.raises(KernelContractError, match=r"row_offset.*128"):
        dequant_fp8(codes, scale, 128, 0)
    with pytest.raises(KernelContractError, match=r"dequant_fp4: scale_u8"):
        dequant_fp4(torch.zeros(2, 16, dtype=torch.int8), scale)


@pytest.mark.benchmark
def test_benchmark_quant() -> None:
    x = torch.randn(256, 4096, dtype=torch.bfloat16)
    print(f"fake_quant_fp8 256x4096: {microseconds(lambda: fake_quant_fp8(x, 128)):.0f} us")
    print(f"fake_quant_fp4 256x4096: {microseconds(lambda: fake_quant_fp4(x)):.0f} us")
