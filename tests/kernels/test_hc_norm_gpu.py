"""The fused hyper-connection ops on the GPU: the bits of the single ops, norm and FP8 form behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.quant_rows.api import QuantRows
from tests.helpers.gpu import Implementation, assert_rows_alone, there
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
fused = Implementation("kernels.hc_norm.cuda_impl")
single = Implementation("kernels.hc.cuda_impl")
both = Implementation("kernels.hc_post_pre.cuda_impl")
norm = Implementation("kernels.quant_rows.cuda_impl")
PRE = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
# One cluster, two, groups of few and of many tokens, tiles (the last ones use each slot of the words more
# than once); widths of 16, 20 and 28 slabs.
SHAPES = [
    (1, 4096),
    (7, 4096),
    (13, 4096),
    (64, 4096),
    (150, 4096),
    (11, 7168),
    (61, 7168),
    (90, 7168),
    (9, 5120),
    (0, 4096),
    (2200, 4096),
    (1100, 7168),
]


def params(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return there(
        (torch.randn(24, 4 * dim) * (4 * dim) ** -0.5, torch.rand(3) + 0.5, torch.randn(24) * 0.5)
    )


def parts(results: tuple[object, ...]) -> list[Tensor]:
    """The tensors of a result, codes as bytes."""
    flat: list[Tensor] = []
    for item in results:
        if isinstance(item, QuantRows):
            flat += [item.q.view(torch.uint8), item.scale]
        else:
            assert isinstance(item, Tensor)
            flat.append(item)
    return flat


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_the_bits_of_the_single_ops(tokens: int, dim: int, weight_dtype: torch.dtype) -> None:
    x = there(column_slice((torch.randn(tokens, 4, dim) * 2).bfloat16()))
    a = there(column_slice(torch.randn(tokens, dim).bfloat16()))
    post, comb = there((torch.rand(tokens, 4) * 2, torch.rand(tokens, 4, 4)))
    weight = there((torch.rand(dim) + 0.5).to(weight_dtype))
    mix = params(dim)

    def pre(s: slice) -> list[Tensor]:
        return parts(fused.hc_pre_norm(x[s], *mix, weight, rms_eps=1e-5, **PRE))

    def post_pre(s: slice) -> list[Tensor]:
        args = (a[s], x[s], post[s], comb[s])
        return parts(fused.hc_post_pre_norm(*args, *mix, weight, rms_eps=1e-5, **PRE))

    out, *factors = single.hc_pre(x, *mix, **PRE)
    want = parts((*norm.rms_norm_quant(out, weight, 1e-5), *factors))
    streams, out, *factors = both.hc_post_pre(a, x, post, comb, *mix, **PRE)
    more = parts((streams, *norm.rms_norm_quant(out, weight, 1e-5), *factors))
    rows = sorted({0, tokens // 2, tokens - 1}) if tokens else []
    for run, expected in ((pre, want), (post_pre, more)):
        for part, (got, tensor) in enumerate(zip(run(slice(None)), expected, strict=True)):
            assert torch.equal(got, tensor)
            assert_rows_alone(lambda s, f=run, p=part: f(s)[p], got, rows)


@pytest.mark.parametrize("tokens", [5, 150])
def test_not_a_number_stays_in_its_row(tokens: int) -> None:
    x, a = there((torch.randn(tokens, 4, 4096).bfloat16(), torch.randn(tokens, 4096).bfloat16()))
    post, comb, weight = there(
        (torch.rand(tokens, 4) * 2, torch.rand(tokens, 4, 4), torch.rand(4096))
    )
    mix, others = params(4096), [i for i in range(tokens) if i != 2]

    def results() -> list[tuple[Tensor, QuantRows]]:
        pre = fused.hc_pre_norm(x, *mix, weight, rms_eps=1e-5, **PRE)
        both = fused.hc_post_pre_norm(a, x, post, comb, *mix, weight, rms_eps=1e-5, **PRE)
        return [pre[:2], both[1:3]]

    clean = results()
    x[2, 1, 77] = float("nan")
    for (normed, rows), (want, want_rows) in zip(results(), clean, strict=True):
        assert bool(normed[2].isnan().all())
        assert bool((rows.scale[2] == 255).all())
        assert torch.equal(normed[others], want[others])
        assert torch.equal(rows.scale[others], want_rows.scale[others])


def test_float32_and_other_widths_run_the_single_ops() -> None:
    for dtype, dim in ((torch.float32, 4096), (torch.bfloat16, 128)):
        x, mix = there(torch.randn(3, 4, dim).to(dtype)), params(dim)
        weight = there(torch.rand(dim))
        out, *factors = single.hc_pre(x, *mix, **PRE)
        want = parts((*norm.rms_norm_quant(out, weight, 1e-5), *factors))
        got = parts(fused.hc_pre_norm(x, *mix, weight, rms_eps=1e-5, **PRE))
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(("tokens", "dim"), [*SHAPES, (33, 4096), (3, 96)])
def test_a_wide_result_is_rounded_first(tokens: int, dim: int) -> None:
    x = there(column_slice((torch.randn(tokens, 4, dim) * 2).bfloat16()))
    wide = there(column_slice(torch.randn(tokens, dim)))
    post, comb = there((torch.rand(tokens, 4) * 2, torch.rand(tokens, 4, 4)))
    weight = there(torch.rand(dim) + 0.5)
    mix = params(dim)
    for op, more in ((fused.hc_post_pre_norm, (weight,)), (both.hc_post_pre, ())):
        eps = {"rms_eps": 1e-5} if more else {}
        got, want = (
            parts(op(a, x, post, comb, *mix, *more, **eps, **PRE)) for a in (wide, wide.bfloat16())
        )
        for mine, other in zip(got, want, strict=True):
            assert torch.equal(mine, other)
