"""Quantised rows on the CPU: codes and scales are those of the fake rounding."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    KernelContractError,
    act_quant,
    fake_quant_fp8,
    quant_rows,
    rms_norm,
    rms_norm_quant,
    swiglu,
    swiglu_quant,
)
from tests.helpers.strided import column_slice, microseconds

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "offset"), [(256, 0), (200, 0), (300, 77), (17, 120)])
def test_values_are_the_rounded_rows(k: int, offset: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, k) * torch.exp2(torch.randint(-20, 9, (5, 1)).float())).to(dtype)
    x[2] = 0
    got = quant_rows(column_slice(x), col_offset=offset)
    assert torch.equal(got.values(), fake_quant_fp8(x, 128, None, offset).float())
    assert got.q.stride(0) % 16 == 0
    assert got.scale.stride(0) % 16 == 0
    if not offset:
        codes, scale = act_quant(x)
        assert torch.equal(got.q.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(torch.exp2(got.scale.float() - 127), scale)
    amax = torch.full(got.scale.shape, 1000.0)
    forced = quant_rows(x, amax=amax, col_offset=offset)
    assert torch.equal(forced.values(), fake_quant_fp8(x, 128, amax, offset).float())
    assert quant_rows(x[:0], col_offset=offset).shape == (0, k)


def test_not_finite_rows_are_nan() -> None:
    x = torch.randn(3, 256)
    x[0, 3], x[1, 200] = float("nan"), float("inf")
    values = quant_rows(x).values()
    assert torch.equal(values.isnan().sum(1), torch.tensor([128, 128, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_producers(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 256).to(dtype), torch.rand(256)
    normed, rows = rms_norm_quant(x, weight, 1e-6)
    assert torch.equal(normed, rms_norm(x, weight, 1e-6))
    assert torch.equal(rows.values(), fake_quant_fp8(normed, 128).float())
    factors = torch.rand(4)
    hidden = swiglu(x, -x, limit=1.0, row_weight=factors)
    got = swiglu_quant(x, -x, limit=1.0, row_weight=factors)
    assert torch.equal(got.values(), fake_quant_fp8(hidden, 128).float())


def test_contract_errors() -> None:
    with pytest.raises(KernelContractError, match=r"col_offset: expected 0\.\.127, got 128"):
        quant_rows(torch.randn(2, 256), col_offset=128)
    with pytest.raises(KernelContractError, match="quant_rows: amax"):
        quant_rows(torch.randn(2, 256), amax=torch.ones(2, 3))
    with pytest.raises(KernelContractError, match="swiglu_quant: limit"):
        swiglu_quant(torch.randn(2, 8), torch.randn(2, 8), limit=0.0)


@pytest.mark.benchmark
def test_benchmark_quant_rows() -> None:
    x = torch.randn(64, 4096)
    print(f"quant_rows 64 x 4096: {microseconds(lambda: quant_rows(x)):.0f} us")
