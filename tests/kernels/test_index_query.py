from __future__ import annotations

import pytest
import torch

from kernels import KernelContractError, index_query
from tests.kernels.oracle64 import (
    DTYPES,
    assert_close,
    column_slice,
    fq4,
    frequencies,
    hadamard64,
    report,
    rope64,
    rounded,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_against_fp64(dtype: torch.dtype, dim: int) -> None:
    q = torch.randn(3, 2, dim).to(dtype)
    positions, inv_freq = torch.tensor([0, 9, 123_456]), frequencies(32, 160_000.0)
    plain = index_query(q, positions, inv_freq, quantize=False)
    got = index_query(q, positions, inv_freq, quantize=True)
    assert got.dtype is plain.dtype is dtype
    same = total = 0
    for t, position in enumerate(positions.tolist()):
        for h in range(2):
            rotated = rounded(rope64(q[t, h], position, inv_freq), dtype)
            assert_close(plain[t, h], rotated, dtype)
            want = fq4(rounded(hadamard64(rotated), dtype))
            same += int((got[t, h].double() == want).sum())
            total += dim
            # A value next to a rounding boundary may fall on the other side: one FP4 step.
            assert ((got[t, h].double() - want).abs() <= want.abs().max() / 3).all()
    assert same >= 0.98 * total


def test_rounding_is_the_last_step() -> None:
    """Results are FP4 values: at most 15 distinct multiples of each block's scale."""
    got = index_query(torch.randn(4, 2, 128), torch.arange(4), frequencies(64), quantize=True)
    for block in got.double().view(-1, 32):
        assert torch.equal(block, fq4(block))


def test_scores_survive_the_rotation() -> None:
    """The rotation is orthonormal: only FP4 rounding may move <q, k>."""
    q, k = torch.randn(64, 1, 128), torch.randn(64, 1, 128)
    at = torch.zeros(64, dtype=torch.int64)
    exact = (q * k).sum(-1)
    got = (
        index_query(q, at, frequencies(64), quantize=True)
        * index_query(k, at, frequencies(64), quantize=True)
    ).sum(-1)
    assert float((got - exact).square().mean().sqrt()) < 0.25 * float(exact.square().mean().sqrt())


def test_strided_and_zero_rows() -> None:
    q, positions, inv_freq = torch.randn(3, 2, 128), torch.arange(3), frequencies(64)
    want = index_query(q, positions, inv_freq, quantize=True)
    assert torch.equal(index_query(column_slice(q), positions, inv_freq, quantize=True), want)
    none = torch.zeros(0, dtype=torch.int64)
    assert index_query(q[:0], none, inv_freq, quantize=True).shape == (0, 2, 128)


def test_contract() -> None:
    with pytest.raises(KernelContractError, match="power of two"):
        index_query(torch.zeros(1, 2, 96), torch.arange(1), frequencies(64), quantize=True)
    with pytest.raises(KernelContractError, match="index_query: q"):
        index_query(torch.zeros(1, 128), torch.arange(1), frequencies(64), quantize=True)


@pytest.mark.benchmark
def test_benchmark() -> None:
    q, positions = torch.randn(512, 64, 128).bfloat16(), torch.arange(512)
    report(
        "index_query 512x64x128 bf16",
        lambda: index_query(q, positions, frequencies(64), quantize=True),
    )
