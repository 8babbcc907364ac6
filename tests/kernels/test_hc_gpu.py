"""Hyper-connections on the GPU against the twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.hc import reference
from kernels.hc_post_pre import reference as both_reference
from tests.helpers.gpu import Implementation, assert_near, assert_rows_alone, there
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
impl = Implementation("kernels.hc.cuda_impl")
both = Implementation("kernels.hc_post_pre.cuda_impl")
DTYPES = [torch.float32, torch.bfloat16]
# A few tokens, then tiles; 2200 tokens are 18 tiles of each group of blocks.
SHAPES = [(5, 4, 4096), (70, 4, 4096), (2200, 4, 4096), (130, 4, 7168), (3, 2, 40), (0, 4, 64)]
PRE = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
HEAD = {"eps": 1e-6, "norm_eps": 1e-6}
FACTOR = 1e-5  # norm-wise error of f32 factors whose sums run over up to 28,672 products


def params(r: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    mixes = (2 + r) * r
    return (
        torch.randn(mixes, r * dim) * (r * dim) ** -0.5,
        torch.rand(3) + 0.5,
        torch.randn(mixes) * 0.5,
    )


def rounded(dtype: torch.dtype) -> dict[str, float]:
    if dtype is torch.float32:
        return {"bound": FACTOR}
    return {"bound": 2e-3, "unequal": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "r", "dim"), SHAPES)
def test_hc_pre_and_head(tokens: int, r: int, dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(tokens, r, dim) * 2).to(dtype)
    fn, scale, base = params(r, dim)
    want = reference.hc_pre(x.double(), fn.double(), scale.double(), base.double(), **PRE)
    w_head = reference.hc_head(
        x.double(), fn[:r].double(), scale[:1].double(), base[:r].double(), **HEAD
    )
    fn, scale, base = there((fn, scale, base))
    strided = there(column_slice(x))
    x = there(x)
    got = impl.hc_pre(x, fn, scale, base, **PRE)
    assert_near(got[0], want[0].to(dtype), **rounded(dtype))
    assert_near(got[1], want[1].float(), bound=FACTOR)
    assert_near(got[2], want[2].float(), bound=FACTOR)
    head = impl.hc_head(x, fn[:r], scale[:1], base[:r], **HEAD)
    assert_near(head, w_head.to(dtype), **rounded(dtype))
    for a, b in zip(impl.hc_pre(strided, fn, scale, base, **PRE), got, strict=True):
        assert torch.equal(a, b)
    rows = sorted({0, tokens // 2, tokens - 1}) if tokens else []
    for part in range(3):
        assert_rows_alone(
            lambda s, p=part: impl.hc_pre(x[s], fn, scale, base, **PRE)[p], got[part], rows
        )
    assert_rows_alone(lambda s: impl.hc_head(x[s], fn[:r], scale[:1], base[:r], **HEAD), head, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "r", "dim"), SHAPES)
def test_hc_post_and_post_pre(tokens: int, r: int, dim: int, dtype: torch.dtype) -> None:
    x, a = (torch.randn(tokens, r, dim) * 2).to(dtype), torch.randn(tokens, dim).to(dtype)
    post, comb = torch.rand(tokens, r) * 2, torch.rand(tokens, r, r)
    fn, scale, base = params(r, dim)
    want = reference.hc_post(a.double(), x.double(), post.double(), comb.double())
    a, x, post, comb, fn, scale, base = there((a, x, post, comb, fn, scale, base))
    streams = impl.hc_post(a, x, post, comb)
    assert_near(streams, want.to(dtype), bound=1e-3 if dtype is torch.bfloat16 else 1e-6)
    rows = sorted({0, tokens // 2, tokens - 1}) if tokens else []
    assert_rows_alone(lambda s: impl.hc_post(a[s], x[s], post[s], comb[s]), streams, rows)

    def run(s: slice) -> tuple[Tensor, ...]:
        return both.hc_post_pre(a[s], x[s], post[s], comb[s], fn, scale, base, **PRE)

    got = run(slice(None))
    assert torch.equal(got[0], streams)
    twin = both_reference.hc_post_pre(a, x, post, comb, fn, scale, base, **PRE)
    assert_near(got[1], twin[1], **rounded(dtype))
    assert_near(got[2], twin[2], bound=FACTOR)
    assert_near(got[3], twin[3], bound=FACTOR)
    for part in range(4):
        assert_rows_alone(lambda s, p=part: run(s)[p], got[part], rows)
