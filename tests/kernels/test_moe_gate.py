"""The router: formula in float64, underflow, ties, hash routing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import KernelContractError, moe_gate
from tests.helpers.strided import column_slice, microseconds


def score(logit: float) -> float:
    return math.sqrt(logit if logit > 20 else math.log1p(math.exp(logit)))


def formula(
    logits: Tensor, bias: Tensor | None, k: int, scale: float
) -> tuple[list[list[int]], list[list[float]]]:
    ids, weights = [], []
    for row in logits.double().tolist():
        s = [score(v) for v in row]
        add = [0.0] * len(s) if bias is None else bias.tolist()
        best = sorted(range(len(s)), key=lambda e: (-(s[e] + add[e]), e))[:k]
        best.sort()
        total = sum(s[e] for e in best)
        ids.append(best)
        weights.append([s[e] / total * scale for e in best])
    return ids, weights


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_score_routing(biased: bool, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = (torch.randn(40, 64) * 2).to(dtype)
    gate = (torch.randn(32, 64) * 0.5).to(weight_dtype)
    bias = torch.randn(32) * 0.5 if biased else None
    logits = x.double() @ gate.double().t()
    assert logits.max() > 20
    want_ids, want_weights = formula(logits, bias, 6, 1.5)
    ids, weights = moe_gate(x, gate, k=6, route_scale=1.5, bias=bias)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.tolist() == want_ids
    torch.testing.assert_close(weights.tolist(), want_weights, rtol=1e-5, atol=1e-6)
    strided = moe_gate(column_slice(x), gate, k=6, route_scale=1.5, bias=bias)
    assert torch.equal(strided[0], ids)
    torch.testing.assert_close(strided[1], weights, rtol=1e-5, atol=1e-6)


def test_the_bias_decides_but_does_not_weigh() -> None:
    gate = torch.eye(4)
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 100.0])
    ids, weights = moe_gate(x, gate, k=2, route_scale=2.5, bias=bias)
    assert ids.tolist() == [[0, 3]]
    s = [score(3.0), score(0.0)]
    torch.testing.assert_close(weights.tolist(), [[2.5 * v / sum(s) for v in s]])


@pytest.mark.parametrize("level", [-200.0, -160.0, -104.0, -88.0, -20.0, 0.0, 20.0, 200.0])
def test_extreme_logits_give_finite_weights(level: float) -> None:
    """SGLang 34459: softplus underflow made weights zero or NaN."""
    gate = torch.eye(16)
    x = level + torch.randn(50, 16) * 0.5
    ids, weights = moe_gate(x, gate, k=6, route_scale=1.5)
    assert weights.isfinite().all()
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 1.5))
    if -150 < level < 0:  # no floor here: exp(logit / 2) to first order
        part = torch.exp((x.gather(1, ids) - level).double() / 2)
        if level < -15:
            want = 1.5 * part / part.sum(1, keepdim=True)
            torch.testing.assert_close(weights.double(), want, rtol=1e-4, atol=0)


def test_all_scores_at_the_floor_share_equally() -> None:
    logits = torch.tensor([-161.0, -180.0, -200.0, float("-inf"), -1e30])
    ids, weights = moe_gate(torch.ones(1, 1), logits.view(5, 1), k=4, route_scale=2.5)
    assert ids.tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(weights, torch.full((1, 4), 2.5 / 4))


def test_scores_join_smoothly_at_the_switch() -> None:
    logits = torch.linspace(-25, -15, 201)
    weights = [
        float(moe_gate(v.view(1, 1), torch.tensor([[1.0], [0.0]]), k=2, route_scale=1.0)[1][0, 0])
        for v in logits
    ]
    want = [score(float(v)) / (score(float(v)) + score(0.0)) for v in logits]
    torch.testing.assert_close(weights, want, rtol=2e-6, atol=0)


def test_ties_go_to_the_smaller_expert() -> None:
    x = torch.ones(3, 2)
    ids, weights = moe_gate(x, torch.ones(384, 2), k=6, route_scale=1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    torch.testing.assert_close(weights, torch.full((3, 6), 1 / 6))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_hash_routing(dtype: torch.dtype) -> None:
    table = torch.stack([torch.randperm(16)[:6] for _ in range(20)]).to(dtype)
    tokens = torch.tensor([0, 19, 7, 7])
    x, gate = torch.randn(4, 8), torch.randn(16, 8)
    ids, weights = moe_gate(x, gate, k=6, route_scale=1.5, tid2eid=table, token_ids=tokens)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [sorted(table[t].tolist()) for t in tokens]
    logits = x.double() @ gate.double().t()
    for t in range(4):
        s = [score(float(logits[t, e])) for e in ids[t].tolist()]
        want = [1.5 * v / sum(s) for v in s]
        torch.testing.assert_close(weights[t].tolist(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token", [-1, 20])
def test_a_token_outside_the_table_is_an_error(token: int) -> None:
    table = torch.zeros(20, 2, dtype=torch.int64)
    with pytest.raises(KernelContractError, match=rf"token_ids.*0\.\.19, got {token}"):
        moe_gate(
            torch.zeros(2, 4),
            torch.zeros(8, 4),
            k=2,
            route_scale=1.0,
            tid2eid=table,
            token_ids=torch.tensor([3, token]),
        )


def test_an_expert_outside_the_range_is_an_error() -> None:
    table = torch.tensor([[0, 8], [0, 1]])
    args = {"k": 2, "route_scale": 1.0, "tid2eid": table}
    x, gate = torch.zeros(1, 4), torch.zeros(8, 4)
    moe_gate(x, gate, token_ids=torch.tensor([1]), **args)
    with pytest.raises(KernelContractError, match=r"tid2eid.*0\.\.7, got 8"):
        moe_gate(x, gate, token_ids=torch.tensor([0]), **args)


def test_zero_rows() -> None:
    x, gate = torch.zeros(0, 4), torch.zeros(8, 4)
    table = torch.zeros(5, 2, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    for extra in ({}, {"tid2eid": table, "token_ids": none}):
        ids, weights = moe_gate(x, gate, k=2, route_scale=1.0, **extra)
        assert ids.shape == weights.shape == (0, 2)


def test_contract_errors() -> None:
    x, gate = torch.zeros(2, 4), torch.zeros(8, 4)
    table, tokens = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelContractError, match=r"moe_gate: k: expected 1\.\.8, got 9"):
        moe_gate(x, gate, k=9, route_scale=1.0)
    with pytest.raises(KernelContractError, match="together"):
        moe_gate(x, gate, k=2, route_scale=1.0, tid2eid=table)
    with pytest.raises(KernelContractError, match="no bias with tid2eid"):
        moe_gate(
            x, gate, k=2, route_scale=1.0, bias=torch.zeros(8), tid2eid=table, token_ids=tokens
        )
    with pytest.raises(KernelContractError, match=r"tid2eid.*\[any, 3\].*\[5, 2\]"):
        moe_gate(x, gate, k=3, route_scale=1.0, tid2eid=table, token_ids=tokens)
    with pytest.raises(KernelContractError, match=r"moe_gate: weight.*\[any, 4\].*\[8, 5\]"):
        moe_gate(x, torch.zeros(8, 5), k=2, route_scale=1.0)


@pytest.mark.benchmark
def test_benchmark_moe_gate() -> None:
    x, gate = torch.randn(64, 4096, dtype=torch.bfloat16), torch.randn(256, 4096)

    def run() -> tuple[Tensor, Tensor]:
        return moe_gate(x, gate, k=6, route_scale=1.5)

    print(f"moe_gate 64x4096, 256 experts: {microseconds(run):.0f} us")
