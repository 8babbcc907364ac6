from __future__ import annotations

import math

import pytest
import torch

from kernels import KernelContractError, q_norm_rope
from tests.kernels.oracle64 import (
    DTYPES,
    assert_close,
    column_slice,
    frequencies,
    report,
    rope64,
    rounded,
)

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 512])
def test_against_fp64(dtype: torch.dtype, dim: int) -> None:
    """In bf16 the norm rounds the squares, the mean, the root and the product, as the official code."""
    q = (torch.randn(3, 2, dim) * 3).to(dtype)
    positions, inv_freq = torch.tensor([0, 77, 300_001]), frequencies(64)
    got = q_norm_rope(q, positions, inv_freq, EPS)
    assert got.dtype is dtype
    for t, position in enumerate(positions.tolist()):
        for h in range(2):
            row = q[t, h].double()
            mean = rounded(rounded(row * row, dtype).mean(), dtype)
            inverse = rounded(1 / rounded(mean + EPS, dtype).sqrt(), dtype)
            want = rope64(rounded(row * inverse, dtype), position, inv_freq)
            assert_close(got[t, h], want, dtype)


def test_unit_rms_in_fp32() -> None:
    got = q_norm_rope(torch.randn(4, 3, 128) * 50, torch.arange(4), frequencies(64), EPS)
    assert torch.allclose(got.norm(dim=-1), torch.full((4, 3), math.sqrt(128)), rtol=1e-5)


def test_zero_head_and_zero_rows() -> None:
    got = q_norm_rope(torch.zeros(2, 1, 128), torch.arange(2), frequencies(64), EPS)
    assert torch.equal(got, torch.zeros(2, 1, 128))
    none = torch.zeros(0, dtype=torch.int64)
    assert q_norm_rope(torch.zeros(0, 4, 128), none, frequencies(64), EPS).shape == (0, 4, 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(dtype: torch.dtype) -> None:
    q, positions, inv_freq = torch.randn(3, 2, 128).to(dtype), torch.arange(3), frequencies(64)
    want = q_norm_rope(q, positions, inv_freq, EPS)
    assert torch.equal(q_norm_rope(column_slice(q), positions, inv_freq, EPS), want)


def test_contract() -> None:
    with pytest.raises(KernelContractError, match="q_norm_rope: q"):
        q_norm_rope(torch.zeros(3, 128), torch.arange(3), frequencies(64), EPS)
    with pytest.raises(KernelContractError, match="dtype"):
        q_norm_rope(torch.zeros(3, 1, 128).half(), torch.arange(3), frequencies(64), EPS)


@pytest.mark.benchmark
def test_benchmark() -> None:
    q, positions = torch.randn(1024, 16, 512).bfloat16(), torch.arange(1024)
    report("q_norm_rope 1024x16x512 bf16", lambda: q_norm_rope(q, positions, frequencies(64), EPS))
