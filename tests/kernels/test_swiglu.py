"""Clamped SwiGLU against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import KernelContractError, swiglu
from tests.helpers.strided import column_slice, microseconds


def formula(g: Tensor, u: Tensor, limit: float, row_weight: Tensor | None) -> Tensor:
    g, u = g.double(), u.double()
    g = torch.minimum(g, torch.tensor(limit, dtype=torch.float64))
    u = torch.maximum(torch.minimum(u, torch.tensor(limit)), torch.tensor(-limit))
    out = g / (1 + (-g).exp()) * u
    return out if row_weight is None else out * row_weight.double()[:, None]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula(dtype: torch.dtype, weighted: bool) -> None:
    g, u = (torch.randn(11, 96) * 12).to(dtype), (torch.randn(11, 96) * 12).to(dtype)
    assert (g > 10).any()
    assert (u < -10).any()
    row_weight = torch.rand(11) if weighted else None
    got = swiglu(g, u, limit=10.0, row_weight=row_weight)
    assert got.dtype == dtype
    want = formula(g, u, 10.0, row_weight)
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)
    strided = swiglu(column_slice(g), column_slice(u, 1, 9), limit=10.0, row_weight=row_weight)
    assert torch.equal(strided, got)


def test_clamps_are_one_sided_for_the_gate_and_two_sided_for_up() -> None:
    g = torch.tensor([[50.0, -50.0, 1.0, 1.0]])
    u = torch.tensor([[1.0, 1.0, 50.0, -50.0]])
    got = swiglu(g, u, limit=10.0)[0]
    silu_10 = 10 / (1 + torch.tensor(-10.0).exp())
    torch.testing.assert_close(got[0], silu_10)
    assert abs(float(got[1])) < 1e-19
    torch.testing.assert_close(got[2], -got[3])
    torch.testing.assert_close(got[2], 10 / (1 + torch.tensor(-1.0).exp()))


def test_halves_of_a_fused_product_and_zero_rows() -> None:
    fused = torch.randn(4, 64)
    want = swiglu(fused[:, :32].clone(), fused[:, 32:].clone(), limit=7.0)
    assert torch.equal(swiglu(fused[:, :32], fused[:, 32:], limit=7.0), want)
    assert swiglu(fused[:0, :32], fused[:0, 32:], limit=7.0).shape == (0, 32)


def test_the_row_weight_comes_before_the_cast() -> None:
    g, u = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    row_weight = torch.rand(64)
    once = swiglu(g, u, limit=10.0, row_weight=row_weight)
    twice = (swiglu(g, u, limit=10.0).float() * row_weight[:, None]).bfloat16()
    exact = formula(g, u, 10.0, row_weight)
    assert (once.double() - exact).abs().sum() < 0.8 * (twice.double() - exact).abs().sum()


def test_contract_errors() -> None:
    g = torch.zeros(2, 4)
    with pytest.raises(KernelContractError, match=r"swiglu: u.*\[2, 4\].*\[2, 5\]"):
        swiglu(g, torch.zeros(2, 5), limit=10.0)
    with pytest.raises(KernelContractError, match=r"swiglu: u.*bfloat16"):
        swiglu(g, g.bfloat16(), limit=10.0)
    with pytest.raises(KernelContractError, match=r"swiglu: limit.*0"):
        swiglu(g, g, limit=0.0)
    with pytest.raises(KernelContractError, match="swiglu: row_weight"):
        swiglu(g, g, limit=10.0, row_weight=torch.zeros(3))


@pytest.mark.benchmark
def test_benchmark_swiglu() -> None:
    g = torch.randn(256, 2048, dtype=torch.bfloat16)
    print(f"swiglu 256x2048: {microseconds(lambda: swiglu(g, g, limit=10.0)):.0f} us")
