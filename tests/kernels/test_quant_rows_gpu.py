"""Quantised rows on the GPU: the bits of the torch twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import QuantRows, quant_rows, rms_norm_quant, swiglu_quant
from kernels.quant_rows import reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 4096), (3, 1024), (257, 7168), (5, 200), (2, 17), (0, 256), (33, 1536)]


def rows(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Values over many powers of two, with a zero block and tiny ones."""
    x = torch.randn(shape, device="cuda") * torch.exp2(
        torch.randint(-20, 20, (shape[0], 1), device="cuda").float()
    )
    x[:, :1] = 0
    if shape[0] > 1:
        x[1] = 0
    return x.to(dtype)


def strided(x: Tensor, pad: int = 8) -> Tensor:
    wide = torch.full(
        (x.shape[0], x.shape[1] + 2 * pad), float("nan"), device="cuda", dtype=x.dtype
    )
    wide[:, pad : pad + x.shape[1]] = x
    return wide[:, pad : pad + x.shape[1]]


def assert_same(got: QuantRows, want: QuantRows) -> None:
    assert got.shape == want.shape
    assert got.col_offset == want.col_offset
    assert torch.equal(got.scale, want.scale)
    assert torch.equal(got.q.view(torch.uint8), want.q.view(torch.uint8))
    assert got.q.data_ptr() % 16 == 0
    assert got.q.stride(0) % 16 == 0
    assert got.scale.stride(0) % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pad", [8, 3])
def test_codes_and_scales_are_the_twins(
    shape: tuple[int, int], dtype: torch.dtype, pad: int
) -> None:
    x = rows(shape, dtype)
    want = reference.quant_rows(x)
    assert_same(quant_rows(x), want)
    assert_same(quant_rows(strided(x, pad)), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 32, 77])
def test_blocks_follow_the_offset_and_given_maxima(dtype: torch.dtype, offset: int) -> None:
    x = rows((9, 300), dtype)
    want = reference.quant_rows(x, col_offset=offset)
    assert_same(quant_rows(x, col_offset=offset), want)
    amax = torch.rand(want.scale.shape, device="cuda") * 3 + x.float().abs().max()
    got = quant_rows(x, amax=amax, col_offset=offset)
    assert_same(got, reference.quant_rows(x, amax=amax, col_offset=offset))


def test_not_finite_blocks() -> None:
    x = torch.randn(3, 384, device="cuda", dtype=torch.bfloat16)
    x[0, 130], x[1, 5] = float("nan"), float("inf")
    got, want = quant_rows(x), reference.quant_rows(x)
    assert torch.equal(got.scale, want.scale)
    assert torch.equal(got.values().isnan(), want.values().isnan())
    torch.testing.assert_close(got.values(), want.values(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 4096), (300, 4096), (7, 7168), (64, 1024), (5, 1536), (4, 72)]
)
def test_norm_rounds_its_own_result(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda").to(dtype) * 3
    for weight in (
        torch.rand(shape[1], device="cuda"),
        torch.rand(shape[1], device="cuda").bfloat16(),
    ):
        normed, got = rms_norm_quant(strided(x), weight, 1e-6)
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
        exact *= weight.double()
        limit = 3e-7 if dtype is torch.float32 else 3e-3
        assert (normed.double() - exact).norm() < limit * exact.norm()
        assert_same(got, reference.quant_rows(normed))
        alone, one = rms_norm_quant(x[-1:], weight, 1e-6)
        assert torch.equal(alone[0], normed[-1])
        assert torch.equal(one.q.view(torch.uint8)[0], got.q.view(torch.uint8)[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2048), (130, 2048), (9, 3072), (3, 160), (0, 128)])
def test_swiglu_rounds_its_own_result(shape: tuple[int, int], dtype: torch.dtype) -> None:
    both = (torch.randn(shape[0], 2 * shape[1], device="cuda") * 8).to(dtype)
    g, u = both[:, : shape[1]], both[:, shape[1] :]
    weight = torch.rand(shape[0], device="cuda") + 0.1
    for factors in (weight, None):
        got = swiglu_quant(g, u, limit=10.0, row_weight=factors)
        wide, up = g.double().clamp(max=10), u.double().clamp(-10, 10)
        exact = wide / (1 + torch.exp(-wide)) * up
        if factors is not None:
            exact = exact * factors.double().unsqueeze(1)
        want = reference.quant_rows(exact.to(torch.float32).to(dtype))
        # A sum or a product that rounds the other way moves one code, seldom a scale.
        assert (got.scale != want.scale).float().mean() < 1e-3 if shape[0] else True
        error = (got.values() - want.values()).double().norm()
        assert error <= (1e-3 if dtype is torch.float32 else 3e-3) * max(float(exact.norm()), 1e-9)
        if shape[0] > 1:
            last = swiglu_quant(
                g[-1:], u[-1:], limit=10.0, row_weight=None if factors is None else factors[-1:]
            )
            assert torch.equal(last.q.view(torch.uint8)[0], got.q.view(torch.uint8)[-1])
