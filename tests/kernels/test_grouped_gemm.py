"""Routed experts: the loop over experts against one dense formula per row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    KernelContractError,
    PreparedExperts,
    expert_ffn,
    fake_quant_fp8,
    pack_fp4,
    prepare_experts,
    prepare_weight,
    quant_fp8_weight,
)
from tests.helpers.strided import column_slice, microseconds

HIDDEN, INNER, LIMIT = 96, 160, 10.0


def block(kind: str, n: int, k: int) -> BlockWeight:
    w = torch.randn(n, k) * 0.4
    if kind == "fp4":
        return BlockWeight(*pack_fp4(w))
    return BlockWeight(*quant_fp8_weight(w))


def make(kind: str, count: int) -> tuple[PreparedExperts, list[tuple[Tensor, Tensor, Tensor]]]:
    w1 = [block(kind, INNER, HIDDEN) for _ in range(count)]
    w3 = [block(kind, INNER, HIDDEN) for _ in range(count)]
    w2 = [block(kind, HIDDEN, INNER) for _ in range(count)]
    values = [
        (
            prepare_weight(a).matrix.double(),
            prepare_weight(b).matrix.double(),
            prepare_weight(c).matrix.double(),
        )
        for a, b, c in zip(w1, w3, w2, strict=True)
    ]
    return prepare_experts(w1, w3, w2), values


def aq(x: Tensor, dtype: torch.dtype, quantize: bool) -> Tensor:
    x = x.to(dtype)
    return (fake_quant_fp8(x, 128) if quantize else x).double()


def formula(
    row: Tensor,
    weight: float,
    w: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    quantize: bool,
) -> Tensor:
    x = aq(row, dtype, quantize)
    g, u = (w[0] @ x).to(dtype).double(), (w[1] @ x).to(dtype).double()
    g, u = g.clamp(max=LIMIT), u.clamp(-LIMIT, LIMIT)
    a = g / (1 + (-g).exp()) * u * weight
    return (w[2] @ aq(a.float(), dtype, quantize)).to(dtype).double()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_each_row_runs_its_own_expert(kind: str, dtype: torch.dtype, quantize: bool) -> None:
    experts, values = make(kind, 4)
    counts = [3, 0, 5, 1]
    offsets = torch.tensor([0, 3, 3, 8, 9])
    rows = (torch.randn(9, HIDDEN) * 2).to(dtype)
    weight = torch.rand(9) + 0.1
    got = expert_ffn(rows, offsets, weight, experts, limit=LIMIT, quantize=quantize)
    assert got.dtype == dtype
    owner = [e for e, c in enumerate(counts) for _ in range(c)]
    want = torch.stack(
        [formula(rows[i], float(weight[i]), values[owner[i]], dtype, quantize) for i in range(9)]
    )
    # A float32 rounding that falls on the other side of an e4m3 or bf16 tie moves one term.
    error = ((got.double() - want).norm(dim=1) / want.norm(dim=1)).tolist()
    limit = 1e-5 if dtype == torch.float32 and not quantize else 1e-2
    assert max(error) < limit
    assert sorted(error)[4] < (1e-5 if dtype == torch.float32 else 5e-3)
    strided = expert_ffn(
        column_slice(rows), offsets, weight, experts, limit=LIMIT, quantize=quantize
    )
    moved = (strided.double() - got.double()).norm(dim=1) / want.norm(dim=1)
    assert float(moved.max()) < limit


def test_clamp_and_weight_matter() -> None:
    experts, _ = make("fp4", 1)
    rows, weight = torch.randn(4, HIDDEN) * 20, torch.rand(4) + 0.5
    offsets = torch.tensor([0, 4])
    a = expert_ffn(rows, offsets, weight, experts, limit=LIMIT, quantize=False)
    b = expert_ffn(rows, offsets, weight, experts, limit=1e9, quantize=False)
    assert not torch.allclose(a, b, rtol=0.05)
    c = expert_ffn(rows, offsets, weight * 2, experts, limit=LIMIT, quantize=False)
    torch.testing.assert_close(c, a * 2)


def test_zero_rows() -> None:
    experts, _ = make("fp4", 2)
    out = expert_ffn(
        torch.zeros(0, HIDDEN),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(0),
        experts,
        limit=LIMIT,
        quantize=True,
    )
    assert out.shape == (0, HIDDEN)


def test_contract_errors() -> None:
    experts, _ = make("fp4", 2)
    rows, weight = torch.zeros(4, HIDDEN), torch.zeros(4)

    def run(offsets: list[int], row_weight: Tensor = weight, limit: float = LIMIT) -> None:
        expert_ffn(rows, torch.tensor(offsets), row_weight, experts, limit=limit, quantize=False)

    for bad in ([0, 2, 5], [1, 2, 4], [0, 5, 4]):
        with pytest.raises(KernelContractError, match=r"expert_ffn: offsets.*0 to at most 4"):
            run(bad)
    with pytest.raises(KernelContractError, match=r"expert_ffn: offsets.*\[3\].*\[2\]"):
        run([0, 4])
    with pytest.raises(KernelContractError, match="expert_ffn: row_weight"):
        run([0, 2, 4], torch.zeros(5))
    with pytest.raises(KernelContractError, match="expert_ffn: limit"):
        run([0, 2, 4], limit=-1.0)
    one = block("fp4", INNER, HIDDEN)
    with pytest.raises(KernelContractError, match="1, 1 and 0"):
        prepare_experts([one], [one], [])
    with pytest.raises(KernelContractError, match=r"w2\[0\].*\[96, 160\].*\[160, 96\]"):
        prepare_experts([one], [one], [one])


@pytest.mark.benchmark
def test_benchmark_expert_ffn() -> None:
    experts, _ = make("fp4", 8)
    rows, weight = torch.randn(64, HIDDEN), torch.rand(64)
    offsets = torch.arange(9) * 8

    def run() -> Tensor:
        return expert_ffn(rows, offsets, weight, experts, limit=LIMIT, quantize=True)

    print(f"expert_ffn 64 rows, 8 experts: {microseconds(run):.0f} us")
