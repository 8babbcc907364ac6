"""Hyper-connections against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import KernelContractError, hc_head, hc_post, hc_pre
from tests.helpers.strided import column_slice, microseconds

EPS, NORM_EPS, ITERS = 1e-6, 1e-6, 20


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def mixes(x: Tensor, fn: Tensor) -> list[float]:
    flat = x.double().reshape(-1)
    norm = (flat.pow(2).mean() + NORM_EPS) ** -0.5
    return ((fn.double() @ flat) * norm).tolist()


def formula(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iters: int
) -> tuple[Tensor, list[float], list[list[float]]]:
    """One token of hc_pre, number by number."""
    r = x.shape[0]
    mix, s, b = mixes(x, fn), scale.tolist(), base.tolist()
    pre = [sigmoid(mix[j] * s[0] + b[j]) + EPS for j in range(r)]
    post = [2 * sigmoid(mix[r + j] * s[1] + b[r + j]) for j in range(r)]
    at = [
        [mix[2 * r + j * r + k] * s[2] + b[2 * r + j * r + k] for k in range(r)] for j in range(r)
    ]
    comb = []
    for row in at:
        top = max(row)
        e = [math.exp(v - top) for v in row]
        comb.append([v / sum(e) + EPS for v in e])
    for step in range(iters):
        if step:
            comb = [[v / (sum(row) + EPS) for v in row] for row in comb]
        sums = [sum(comb[j][k] for j in range(r)) + EPS for k in range(r)]
        comb = [[comb[j][k] / sums[k] for k in range(r)] for j in range(r)]
    out = sum(pre[j] * x[j].double() for j in range(r))
    return torch.as_tensor(out), post, comb


def params(r: int, d: int, rows: int, scales: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, r * d) * 0.2, torch.rand(scales) + 0.5, torch.randn(rows) * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("r", "d", "iters"), [(4, 40, ITERS), (4, 40, 1), (2, 24, 3)])
def test_hc_pre(r: int, d: int, iters: int, dtype: torch.dtype) -> None:
    x = (torch.randn(6, r, d) * 2).to(dtype)
    fn, scale, base = params(r, d, (2 + r) * r, 3)
    kwargs = {"iters": iters, "eps": EPS, "norm_eps": NORM_EPS}
    out, post, comb = hc_pre(x, fn, scale, base, **kwargs)
    assert (out.dtype, post.dtype, comb.dtype) == (dtype, torch.float32, torch.float32)
    for t in range(6):
        want_out, want_post, want_comb = formula(x[t], fn, scale, base, iters)
        rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out[t].double(), want_out, rtol=rtol, atol=1e-5)
        torch.testing.assert_close(post[t].tolist(), want_post, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(comb[t].tolist(), want_comb, rtol=1e-5, atol=1e-6)
    strided = hc_pre(column_slice(x), fn, scale, base, **kwargs)
    for a, b in zip(strided, (out, post, comb), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_last_step_normalises_columns() -> None:
    x = torch.randn(5, 4, 16)
    fn, scale, base = params(4, 16, 24, 3)
    _, _, comb = hc_pre(x, fn, scale, base * 4, iters=1, eps=EPS, norm_eps=NORM_EPS)
    torch.testing.assert_close(comb.sum(1), torch.ones(5, 4), rtol=0, atol=1e-3)
    assert (comb.sum(2) - 1).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hc_post_sums_over_sources(dtype: torch.dtype) -> None:
    x, a = torch.randn(7, 4, 24).to(dtype), torch.randn(7, 24).to(dtype)
    post, comb = torch.rand(7, 4), torch.rand(7, 4, 4)
    want = torch.zeros(7, 4, 24, dtype=torch.float64)
    for t in range(7):
        for k in range(4):
            want[t, k] = float(post[t, k]) * a[t].double()
            for j in range(4):
                want[t, k] += float(comb[t, j, k]) * x[t, j].double()
    got = hc_post(a, x, post, comb)
    assert got.dtype == dtype
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)
    strided = hc_post(column_slice(a), column_slice(x), column_slice(post), column_slice(comb))
    torch.testing.assert_close(strided, got, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hc_head(dtype: torch.dtype) -> None:
    x = torch.randn(5, 4, 32).to(dtype)
    fn, scale, base = params(4, 32, 4, 1)
    got = hc_head(column_slice(x), fn, scale, base, eps=EPS, norm_eps=NORM_EPS)
    assert got.dtype == dtype
    for t in range(5):
        mix = mixes(x[t], fn)
        w = [sigmoid(m * float(scale) + b) + EPS for m, b in zip(mix, base.tolist(), strict=True)]
        want = sum(w[j] * x[t, j].double() for j in range(4))
        rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got[t].double(), torch.as_tensor(want), rtol=rtol, atol=1e-5)


def test_many_tokens_are_as_exact_as_one() -> None:
    """vLLM #42810: a fused kernel lost accuracy at large token counts."""
    count = 65536
    fn, scale, base = params(4, 8, 24, 3)
    x = torch.randn(64, 4, 8).repeat(count // 64, 1, 1)
    kwargs = {"iters": ITERS, "eps": EPS, "norm_eps": NORM_EPS}
    many, few = hc_pre(x, fn, scale, base, **kwargs), hc_pre(x[:64], fn, scale, base, **kwargs)
    for a, b in zip(many, few, strict=True):
        repeated = b.repeat(count // 64, *([1] * (b.dim() - 1)))
        torch.testing.assert_close(a, repeated, rtol=1e-5, atol=1e-6)
    mixed = hc_post(many[0], x, many[1], many[2])
    torch.testing.assert_close(mixed[-64:], hc_post(few[0], x[:64], few[1], few[2]))


def test_zero_rows() -> None:
    x = torch.zeros(0, 4, 8)
    fn, scale, base = params(4, 8, 24, 3)
    out, post, comb = hc_pre(x, fn, scale, base, iters=2, eps=EPS, norm_eps=NORM_EPS)
    assert (out.shape, post.shape, comb.shape) == ((0, 8), (0, 4), (0, 4, 4))
    assert hc_post(out, x, post, comb).shape == (0, 4, 8)
    head = hc_head(x, fn[:4], scale[:1], base[:4], eps=EPS, norm_eps=NORM_EPS)
    assert head.shape == (0, 8)


def test_contract_errors() -> None:
    x = torch.zeros(2, 4, 8)
    fn, scale, base = params(4, 8, 24, 3)
    kwargs = {"iters": 2, "eps": EPS, "norm_eps": NORM_EPS}
    with pytest.raises(KernelContractError, match=r"hc_pre: fn.*\[24, 32\].*\[23, 32\]"):
        hc_pre(x, fn[:23], scale, base, **kwargs)
    with pytest.raises(KernelContractError, match=r"hc_pre: scale.*\[3\].*\[2\]"):
        hc_pre(x, fn, scale[:2], base, **kwargs)
    with pytest.raises(KernelContractError, match=r"hc_pre: base.*bfloat16"):
        hc_pre(x, fn, scale, base.bfloat16(), **kwargs)
    with pytest.raises(KernelContractError, match=r"hc_pre: iters.*0"):
        hc_pre(x, fn, scale, base, iters=0, eps=EPS, norm_eps=NORM_EPS)
    with pytest.raises(KernelContractError, match=r"hc_post: a.*bfloat16"):
        hc_post(torch.zeros(2, 8).bfloat16(), x, torch.zeros(2, 4), torch.zeros(2, 4, 4))
    with pytest.raises(KernelContractError, match=r"hc_post: comb"):
        hc_post(torch.zeros(2, 8), x, torch.zeros(2, 4), torch.zeros(2, 4, 3))
    with pytest.raises(KernelContractError, match=r"hc_head: scale.*\[1\].*\[3\]"):
        hc_head(x, fn[:4], scale, base[:4], eps=EPS, norm_eps=NORM_EPS)


@pytest.mark.benchmark
def test_benchmark_hc() -> None:
    x = torch.randn(64, 4, 4096, dtype=torch.bfloat16)
    fn, scale, base = params(4, 4096, 24, 3)

    def pre() -> tuple[Tensor, Tensor, Tensor]:
        return hc_pre(x, fn, scale, base, iters=ITERS, eps=EPS, norm_eps=NORM_EPS)

    out, post, comb = pre()
    print(f"hc_pre 64x4x4096: {microseconds(pre):.0f} us")
    print(f"hc_post 64x4x4096: {microseconds(lambda: hc_post(out, x, post, comb)):.0f} us")
