"""``hc_post_pre`` is ``hc_post`` and ``hc_pre``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import KernelContractError, hc_post, hc_post_pre, hc_pre
from tests.helpers.strided import column_slice, microseconds


def arguments(tokens: int, dtype: torch.dtype, r: int = 4, dim: int = 40) -> dict[str, Any]:
    mixes = (2 + r) * r
    return {
        "a": column_slice(torch.randn(tokens, dim).to(dtype)),
        "x": column_slice(torch.randn(tokens, r, dim).to(dtype)),
        "post": torch.rand(tokens, r) * 2,
        "comb": torch.rand(tokens, r, r),
        "fn": torch.randn(mixes, r * dim) * 0.2,
        "scale": torch.rand(3) + 0.5,
        "base": torch.randn(mixes) * 0.5,
        "iters": 20,
        "eps": 1e-6,
        "norm_eps": 1e-6,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "r"), [(6, 4), (3, 2), (0, 4)])
def test_it_is_the_two_ops(tokens: int, r: int, dtype: torch.dtype) -> None:
    args = arguments(tokens, dtype, r)
    streams, out, post, comb = hc_post_pre(**args)
    want = hc_post(args["a"], args["x"], args["post"], args["comb"])
    rest = {name: args[name] for name in ("fn", "scale", "base", "iters", "eps", "norm_eps")}
    assert torch.equal(streams, want)
    for got, twin in zip((out, post, comb), hc_pre(want, **rest), strict=True):
        assert torch.equal(got, twin)


def test_a_wide_result_is_rounded_first() -> None:
    args = arguments(5, torch.bfloat16)
    wide = column_slice(torch.randn(5, 40))
    for got, want in zip(
        hc_post_pre(**args | {"a": wide}),
        hc_post_pre(**args | {"a": wide.bfloat16()}),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_contract() -> None:
    args = arguments(2, torch.float32)
    with pytest.raises(KernelContractError, match=r"post: expected shape \[2, 4\]"):
        hc_post_pre(**args | {"post": torch.rand(2, 3)})
    with pytest.raises(KernelContractError, match="a: expected dtype float32"):
        hc_post_pre(**args | {"a": args["a"].bfloat16()})
    with pytest.raises(KernelContractError, match="iters: expected >= 1, got 0"):
        hc_post_pre(**args | {"iters": 0})
    with pytest.raises(KernelContractError, match=r"fn: expected shape \[24, 160\]"):
        hc_post_pre(**args | {"fn": args["fn"][:4]})


@pytest.mark.benchmark
def test_speed() -> None:
    args = arguments(8, torch.bfloat16)
    print(f"hc_post_pre 8x4x40: {microseconds(lambda: hc_post_pre(**args)):.0f} us")
