"""RMSNorm against float64."""

from __future__ import annotations

import pytest
import torch

from kernels import KernelContractError, rms_norm
from tests.helpers.strided import column_slice, microseconds


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 512), (1, 1)])
def test_formula(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    weight = (1 + 0.3 * torch.randn(shape[-1])).to(weight_dtype)
    wide = x.double()
    want = wide / (wide.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-6).sqrt() * weight.double()
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-7)
    assert torch.equal(rms_norm(column_slice(x), weight, 1e-6), got)


def test_one_cast_only() -> None:
    """A cast before the weight would round twice."""
    x, weight = torch.randn(64, 64).bfloat16(), torch.rand(64) + 0.5
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    error = (rms_norm(x, weight, 1e-6).double() - want).abs()
    assert (error <= want.abs() * 2.0**-8 * 1.001).all()


def test_eps_and_zero_rows() -> None:
    zero = torch.zeros(3, 8)
    assert torch.equal(rms_norm(zero, torch.ones(8), 1e-6), zero)
    assert rms_norm(zero[:0], torch.ones(8), 1e-6).shape == (0, 8)
    tiny = torch.full((1, 8), 1e-3)
    torch.testing.assert_close(rms_norm(tiny, torch.ones(8), 1e-6), torch.full((1, 8), 0.5**0.5))


def test_contract_errors() -> None:
    with pytest.raises(KernelContractError, match=r"rms_norm: weight.*\[8\].*\[7\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(KernelContractError, match=r"rms_norm: x.*int64"):
        rms_norm(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(8), 1e-6)
    with pytest.raises(KernelContractError, match="contiguous last dimension"):
        rms_norm(torch.zeros(8, 2).t(), torch.zeros(8), 1e-6)


@pytest.mark.benchmark
def test_benchmark_rms_norm() -> None:
    x, weight = torch.randn(256, 4096, dtype=torch.bfloat16), torch.ones(4096)
    print(f"rms_norm 256x4096: {microseconds(lambda: rms_norm(x, weight, 1e-6)):.0f} us")
