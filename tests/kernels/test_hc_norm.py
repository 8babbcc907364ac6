"""``hc_pre_norm`` and ``hc_post_pre_norm`` are the ops they join."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import (
    KernelContractError,
    hc_post,
    hc_post_pre_norm,
    hc_pre,
    hc_pre_norm,
    rms_norm_quant,
)
from tests.helpers.strided import column_slice, microseconds

PRE = ("fn", "scale", "base", "iters", "eps", "norm_eps")


def arguments(tokens: int, dtype: torch.dtype, r: int = 4, dim: int = 136) -> dict[str, Any]:
    mixes = (2 + r) * r
    return {
        "x": column_slice(torch.randn(tokens, r, dim).to(dtype)),
        "fn": torch.randn(mixes, r * dim) * 0.2,
        "scale": torch.rand(3) + 0.5,
        "base": torch.randn(mixes) * 0.5,
        "norm_weight": torch.rand(dim) + 0.5,
        "iters": 20,
        "eps": 1e-6,
        "norm_eps": 1e-6,
        "rms_eps": 1e-5,
    }


def mixed(tokens: int, dtype: torch.dtype, r: int = 4, dim: int = 136) -> dict[str, Any]:
    return {
        "a": column_slice(torch.randn(tokens, dim).to(dtype)),
        "post": torch.rand(tokens, r) * 2,
        "comb": torch.rand(tokens, r, r),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "r"), [(6, 4), (3, 2), (0, 4)])
def test_they_are_the_single_ops(tokens: int, r: int, dtype: torch.dtype) -> None:
    args, before = arguments(tokens, dtype, r), mixed(tokens, dtype, r)
    streams, *rest = hc_post_pre_norm(**args, **before)
    assert torch.equal(streams, hc_post(before["a"], args["x"], before["post"], before["comb"]))
    for x, results in ((args["x"], hc_pre_norm(**args)), (streams, rest)):
        out, post, comb = hc_pre(x, **{name: args[name] for name in PRE})
        normed, rows = rms_norm_quant(out, args["norm_weight"], args["rms_eps"])
        assert results[0].dtype is dtype
        for got, want in zip(results, (normed, rows, post, comb), strict=True):
            if got is results[1]:
                assert torch.equal(got.q.view(torch.uint8), want.q.view(torch.uint8))
                assert torch.equal(got.scale, want.scale)
            else:
                assert torch.equal(got, want)


def test_a_wide_result_is_rounded_first() -> None:
    args, before = arguments(5, torch.bfloat16), mixed(5, torch.bfloat16)
    wide = column_slice(torch.randn(5, 136))
    streams, normed, rows, *factors = hc_post_pre_norm(**args, **before | {"a": wide})
    twin = hc_post_pre_norm(**args, **before | {"a": wide.bfloat16()})
    assert torch.equal(rows.q.view(torch.uint8), twin[2].q.view(torch.uint8))
    assert torch.equal(rows.scale, twin[2].scale)
    for got, want in zip((streams, normed, *factors), (*twin[:2], *twin[3:]), strict=True):
        assert got.dtype is want.dtype
        assert torch.equal(got, want)


def test_contract() -> None:
    args, before = arguments(2, torch.float32), mixed(2, torch.float32)
    with pytest.raises(KernelContractError, match=r"hc_pre_norm: norm_weight: expected shape"):
        hc_pre_norm(**args | {"norm_weight": torch.rand(4)})
    with pytest.raises(KernelContractError, match=r"hc_pre_norm: fn: expected shape \[24, 544\]"):
        hc_pre_norm(**args | {"fn": args["fn"][:4]})
    with pytest.raises(KernelContractError, match="iters: expected >= 1, got 0"):
        hc_pre_norm(**args | {"iters": 0})
    with pytest.raises(KernelContractError, match="hc_post_pre_norm: a: expected dtype float32"):
        hc_post_pre_norm(**args, **before | {"a": before["a"].bfloat16()})
    with pytest.raises(KernelContractError, match=r"post: expected shape \[2, 4\]"):
        hc_post_pre_norm(**args, **before | {"post": torch.rand(2, 3)})


@pytest.mark.benchmark
def test_speed() -> None:
    args = arguments(8, torch.bfloat16)
    print(f"hc_pre_norm 8x4x136: {microseconds(lambda: hc_pre_norm(**args)):.0f} us")
