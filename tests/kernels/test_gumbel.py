"""Gumbel noise: distribution, independence, and exact dependence on (seed, step, column) only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import KernelContractError, gumbel_noise
from tests.helpers.strided import microseconds

CPU = torch.device("cpu")


def noise(seeds: list[int], steps: list[int], vocab: int) -> Tensor:
    return gumbel_noise(torch.tensor(seeds), torch.tensor(steps), vocab, CPU)


def python_noise(seed: int, step: int, column: int) -> float:
    """The same hash in Python's unbounded integers, reduced to 64 bits."""
    top = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & top
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & top
        return x ^ (x >> 31)

    weyl = 0x9E3779B97F4A7C15
    key = mix(mix((seed + weyl) & top) ^ (step * 0xD1342543DE82EF95 & top))
    bits = mix((key + (column + 1) * weyl) & top) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def test_bits_are_those_of_unsigned_64_bit_arithmetic() -> None:
    seeds, steps = [0, 1, -1, 2**62, -(2**63)], [0, 7, 123456, -3, 2**40]
    got = noise(seeds, steps, 40).double()
    want = [[python_noise(s, t, c) for c in range(40)] for s, t in zip(seeds, steps, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_distribution() -> None:
    x = noise([5, 6, 7, 8], [0, 1, 2, 3], 200_000).double().flatten()
    assert x.isfinite().all()
    assert abs(float(x.mean()) - 0.577216) < 0.006  # 4 sigma = 0.0057
    assert abs(float(x.var()) - math.pi**2 / 6) < 0.02
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99, 0.9999):
        below = float((x <= -math.log(-math.log(quantile))).double().mean())
        sigma = math.sqrt(quantile * (1 - quantile) / x.numel())
        assert abs(below - quantile) < 5 * sigma


def test_rows_are_independent() -> None:
    """Neighbouring seeds, steps and columns are uncorrelated, also between powers of two."""
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (1 << 32, 0), (0, 1 << 32), (-1, 0)]
    x = noise([s for s, _ in pairs], [t for _, t in pairs], 100_000).double()
    correlation = torch.corrcoef(x) - torch.eye(len(pairs))
    assert correlation.abs().max() < 5 / math.sqrt(100_000)
    lagged = torch.stack([x[0][:-1], x[0][1:]])
    assert abs(float(torch.corrcoef(lagged)[0, 1])) < 5 / math.sqrt(100_000)


def test_argmax_draws_from_the_softmax() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 20_000
    x = gumbel_noise(torch.full((count,), 42), torch.arange(count), 4, CPU) + probs.log()
    seen = torch.bincount(x.argmax(-1), minlength=4).double() / count
    assert (seen - probs).abs().max() < 5 * math.sqrt(0.25 / count)


def test_a_row_depends_on_nothing_else() -> None:
    alone = noise([9], [4], 1000)
    batch = noise([1, 9, 9], [4, 4, 5], 1500)
    assert torch.equal(alone[0], batch[1, :1000])
    assert not torch.equal(batch[1], batch[2])
    assert torch.equal(alone, noise([9], [4], 1000))


def test_zero_rows_and_contract_errors() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert gumbel_noise(none, none, 7, CPU).shape == (0, 7)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(KernelContractError, match="gumbel_noise: steps"):
        gumbel_noise(one, none, 7, CPU)
    with pytest.raises(KernelContractError, match=r"gumbel_noise: seeds.*int64.*int32"):
        gumbel_noise(one.int(), one, 7, CPU)
    with pytest.raises(KernelContractError, match=r"gumbel_noise: vocab.*0"):
        gumbel_noise(one, one, 0, CPU)


@pytest.mark.benchmark
def test_benchmark_gumbel() -> None:
    print(f"gumbel_noise 4x129280: {microseconds(lambda: noise([1] * 4, [2] * 4, 129280)):.0f} us")
