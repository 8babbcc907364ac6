from __future__ import annotations

import pytest
import torch

from kernels import (
    BlockWeight,
    KernelContractError,
    PreparedWeight,
    grouped_output,
    grouped_output_quant,
    linear,
    prepare_weight,
    quant_rows,
)
from kernels.quant.api import quant_fp8_weight
from tests.kernels.oracle64 import (
    DTYPES,
    assert_close,
    column_slice,
    frequencies,
    report,
    rope64,
    rounded,
)


def weight(rows: int, columns: int) -> PreparedWeight:
    return prepare_weight(BlockWeight(torch.randn(rows, columns) / columns**0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_against_fp64(dtype: torch.dtype, dim: int, groups: int) -> None:
    heads, rank = 4, 6
    o = torch.randn(3, heads, dim).to(dtype)
    positions, inv_freq = torch.tensor([0, 5, 250_000]), frequencies(64)
    wo_a = weight(groups * rank, heads // groups * dim)
    got = grouped_output(o, positions, inv_freq, wo_a, groups)
    assert got.dtype is dtype
    want = torch.zeros(3, groups * rank, dtype=torch.float64)
    for t, position in enumerate(positions.tolist()):
        plain = [
            rounded(rope64(o[t, h], position, inv_freq, inverse=True), dtype) for h in range(heads)
        ]
        for g in range(groups):
            mine = torch.cat(plain[g * heads // groups : (g + 1) * heads // groups])
            rows = wo_a.matrix[g * rank : (g + 1) * rank].double()
            want[t, g * rank : (g + 1) * rank] = rows @ mine
    assert_close(got, want, dtype)


def test_fp8_weight_and_its_slices() -> None:
    """Whole groups may be sliced off as views; each gives its own columns of the result."""
    data, scale = quant_fp8_weight(torch.randn(256, 256))
    wo_a = prepare_weight(BlockWeight(data, scale))
    o, positions, inv_freq = torch.randn(3, 4, 128), torch.arange(3), frequencies(64)
    whole = grouped_output(o, positions, inv_freq, wo_a, 2)
    second = grouped_output(o[:, 2:], positions, inv_freq, wo_a.rows(128, 256), 1)
    assert_close(second, whole[:, 128:].double(), torch.float32)


def test_strided_and_zero_rows() -> None:
    o, positions, inv_freq = torch.randn(4, 2, 128), torch.arange(4), frequencies(64)
    wo_a = weight(4, 128)
    want = grouped_output(o, positions, inv_freq, wo_a, 2)
    assert torch.equal(grouped_output(column_slice(o), positions, inv_freq, wo_a, 2), want)
    columns = prepare_weight(BlockWeight(torch.zeros(4, 200))).cols(50, 178)
    columns.matrix.copy_(wo_a.matrix)
    assert_close(grouped_output(o, positions, inv_freq, columns, 2), want.double(), torch.float32)
    assert grouped_output(o[:0], positions[:0], inv_freq, wo_a, 2).shape == (0, 4)


@pytest.mark.parametrize("rank", [128, 100])
def test_fp8_form(rank: int) -> None:
    """Its values are what AQ makes of the plain result, whatever the columns of a group."""
    o, positions, inv_freq = torch.randn(3, 4, 128).bfloat16(), torch.arange(3), frequencies(64)
    wo_a = weight(2 * rank, 256)
    plain = grouped_output(o, positions, inv_freq, wo_a, 2)
    rows = grouped_output_quant(o, positions, inv_freq, wo_a, 2)
    want = quant_rows(plain)
    assert torch.equal(rows.q.float(), want.q.float())
    assert torch.equal(rows.scale, want.scale)
    error = (rows.values() - plain.float()).norm() / plain.float().norm()
    assert 0 < error < 0.05
    assert grouped_output_quant(o[:0], positions[:0], inv_freq, wo_a, 2).shape == (0, 2 * rank)


def test_a_dequantised_weight_is_the_same_weight_without_rounding() -> None:
    data, scale = quant_fp8_weight(torch.randn(256, 256))
    block = BlockWeight(data, scale)
    wo_a, plain = prepare_weight(block), prepare_weight(block, dequantize=True)
    assert torch.equal(plain.matrix.float(), wo_a.matrix)
    o, positions, inv_freq = torch.randn(3, 4, 128), torch.arange(3), frequencies(64)
    want = grouped_output(o, positions, inv_freq, wo_a, 2)
    assert torch.equal(grouped_output(o, positions, inv_freq, plain, 2), want)
    x = torch.randn(2, 256)
    assert torch.equal(linear(x, plain, quantize=True), linear(x, wo_a, quantize=False))
    assert not torch.equal(linear(x, wo_a, quantize=True), linear(x, wo_a, quantize=False))


def test_contract() -> None:
    o, positions, inv_freq = torch.zeros(2, 4, 128), torch.arange(2), frequencies(64)
    with pytest.raises(KernelContractError, match="num_groups 3"):
        grouped_output(o, positions, inv_freq, weight(6, 128), 3)
    with pytest.raises(KernelContractError, match="grouped_output: wo_a"):
        grouped_output(o, positions, inv_freq, weight(6, 128), 2)
    with pytest.raises(KernelContractError, match="grouped_output_quant: wo_a"):
        grouped_output_quant(o, positions, inv_freq, weight(6, 128), 2)
    with pytest.raises(KernelContractError, match="positions"):
        grouped_output(o, positions[:1], inv_freq, weight(6, 256), 2)


@pytest.mark.benchmark
def test_benchmark() -> None:
    o, positions, wo_a = torch.randn(256, 16, 512).bfloat16(), torch.arange(256), weight(2048, 4096)
    report(
        "grouped_output 256x16x512, 2 groups, bf16",
        lambda: grouped_output(o, positions, frequencies(64), wo_a, 2),
    )
