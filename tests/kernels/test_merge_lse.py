from __future__ import annotations

import math

import pytest
import torch

from kernels import KernelContractError, merge_lse
from tests.kernels.oracle64 import DTYPES, assert_close, report

INF = float("inf")


def merged64(
    o: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    parts, tokens, heads, dim = o.shape
    out = torch.zeros(tokens, heads, dim, dtype=torch.float64)
    total = torch.full((tokens, heads), -INF, dtype=torch.float64)
    for t in range(tokens):
        for h in range(heads):
            logs = [float(lse[p, t, h]) for p in range(parts)]
            if max(logs) == -INF:
                continue
            weights = [math.exp(v - max(logs)) for v in logs]
            extra = math.exp(float(sink[h]) - max(logs)) if sink is not None else 0.0
            for p in range(parts):
                if weights[p]:
                    out[t, h] += weights[p] / (sum(weights) + extra) * o[p, t, h].double()
            total[t, h] = max(logs) + math.log(sum(weights))
    return out, total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_against_fp64(dtype: torch.dtype, with_sink: bool, parts: int) -> None:
    o, lse = torch.randn(parts, 4, 3, 128).to(dtype), torch.randn(parts, 4, 3) * 20
    lse[0, 0] = -INF  # one partial without keys: its values must not matter
    o[0, 0] = float("nan")
    lse[:, 2] = -INF  # nobody has keys
    o[:, 2] = float("nan")
    if parts == 1:
        lse[0, 0] = 1.0
        o[0, 0] = 1.0
    sink = torch.tensor([0.0, 15.0, -40.0]) if with_sink else None
    got, got_lse = merge_lse(o, lse, sink)
    want, want_lse = merged64(o, lse, sink)
    assert got.dtype is dtype
    assert_close(got, want, dtype)
    assert torch.equal(got_lse == -INF, want_lse == -INF)
    seen = want_lse > -INF
    assert_close(got_lse[seen], want_lse[seen], torch.float32)
    assert torch.equal(got[2], torch.zeros_like(got[2]))


@pytest.mark.parametrize("sink", [None, torch.tensor([3.0])])
def test_all_empty_gives_zero_not_nan(sink: torch.Tensor | None) -> None:
    o, lse = merge_lse(torch.zeros(2, 1, 1, 8), torch.full((2, 1, 1), -INF), sink)
    assert torch.equal(o, torch.zeros(1, 1, 8))
    assert float(lse) == -INF


def test_large_logits_and_sinks() -> None:
    o, lse = torch.ones(2, 1, 2, 4), torch.tensor([[[300.0, -300.0]], [[299.0, -301.0]]])
    got, got_lse = merge_lse(o, lse)
    assert torch.allclose(got, torch.ones(1, 2, 4))
    assert torch.isfinite(got_lse).all()
    swamped, _ = merge_lse(o, lse, torch.tensor([1e4, 1e4]))
    assert torch.equal(swamped, torch.zeros(1, 2, 4))


def test_strided_and_zero_rows() -> None:
    o, lse = torch.randn(4, 3, 2, 16), torch.randn(4, 3, 2)
    want = merge_lse(o[::2, :, 1:].contiguous(), lse[::2, :, 1:].contiguous())
    got = merge_lse(o[::2, :, 1:], lse[::2, :, 1:])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    empty, empty_lse = merge_lse(torch.zeros(2, 0, 3, 16), torch.zeros(2, 0, 3))
    assert (empty.shape, empty_lse.shape) == ((0, 3, 16), (0, 3))


def test_contract() -> None:
    with pytest.raises(KernelContractError, match="0 partials"):
        merge_lse(torch.zeros(0, 1, 1, 4), torch.zeros(0, 1, 1))
    with pytest.raises(KernelContractError, match="lse"):
        merge_lse(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1))
    with pytest.raises(KernelContractError, match="sink"):
        merge_lse(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1), torch.zeros(2))


@pytest.mark.benchmark
def test_benchmark() -> None:
    o, lse = torch.randn(4, 256, 16, 512).bfloat16(), torch.randn(4, 256, 16)
    report("merge_lse 4x256x16x512 bf16", lambda: merge_lse(o, lse))
