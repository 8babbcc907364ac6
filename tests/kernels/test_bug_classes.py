"""Bug classes of other engines that an op alone can show, where the op's own tests do not name them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    grouped_output,
    hc_pre,
    linear,
    moe_gate,
    prepare_weight,
    topk_merge,
    topk_select,
)
from tests.kernels.oracle64 import frequencies

EPS, ITERS, STREAMS, WIDTH = 1e-6, 20, 4, 12


def sinkhorn64(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """hc_pre over all tokens in float64."""
    flat = x.double().flatten(1)
    mix = flat @ fn.double().t() / (flat.square().mean(1, keepdim=True) + EPS).sqrt()
    s, b = scale.double(), base.double()
    pre = torch.sigmoid(mix[:, :4] * s[0] + b[:4]) + EPS
    post = 2 * torch.sigmoid(mix[:, 4:8] * s[1] + b[4:8])
    comb = torch.softmax((mix[:, 8:] * s[2] + b[8:]).view(-1, 4, 4), -1) + EPS
    for step in range(ITERS):
        if step:
            comb = comb / (comb.sum(2, keepdim=True) + EPS)
        comb = comb / (comb.sum(1, keepdim=True) + EPS)
    return (pre[..., None] * x.double()).sum(1), post, comb


@pytest.mark.parametrize("count", [1, 2, 63, 64, 129, 4097, 65536])
def test_mhc_is_exact_at_any_token_count_vllm_42810(count: int) -> None:
    x = torch.randn(count, STREAMS, WIDTH) * 3
    fn = torch.randn(24, STREAMS * WIDTH) * 0.3
    scale, base = torch.rand(3) + 0.5, torch.randn(24)
    found = hc_pre(x, fn, scale, base, iters=ITERS, eps=EPS, norm_eps=EPS)
    for a, b in zip(found, sinkhorn64(x, fn, scale, base), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_single_row_products_with_random_scales_sglang_25733(rows: int) -> None:
    """Batch 1 took a path of its own that misread scales: a row is a row, whatever its batch."""
    data = (torch.randn(256, 256) * 40).to(torch.float8_e4m3fn)
    exponent = torch.randint(118, 134, (2, 2), dtype=torch.uint8)
    weight = prepare_weight(BlockWeight(data, exponent))
    scales = torch.pow(2.0, exponent.double() - 127)
    dense = data.double() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    x = torch.randn(rows, 256)
    want = x.double() @ dense.t()
    torch.testing.assert_close(
        linear(x, weight, quantize=False).double(), want, rtol=1e-4, atol=want.abs().max() * 1e-5
    )
    o = x.view(rows, 2, 128)
    flat = grouped_output(o, torch.zeros(rows, dtype=torch.int64), frequencies(64), weight, 1)
    torch.testing.assert_close(flat.double(), want, rtol=1e-4, atol=want.abs().max().item() * 1e-5)


@pytest.mark.parametrize("hashed", [False, True])
def test_gate_weights_are_finite_and_sum_up_sglang_34459(hashed: bool) -> None:
    """Router logits from -200 to 200 in one row and across rows, for both kinds of gate."""
    levels = torch.linspace(-200, 200, 41)
    x = torch.cat([levels[:, None], torch.ones(41, 1)], 1)
    weight = torch.stack([torch.linspace(-1, 1, 8), torch.linspace(-200, 200, 8)], 1)
    table = torch.arange(8).expand(41, 8)[:, 2:6].contiguous()
    routes = (
        {"tid2eid": table, "token_ids": torch.arange(41)} if hashed else {"bias": torch.zeros(8)}
    )
    ids, weights = moe_gate(x, weight, k=4, route_scale=2.5, **routes)  # type: ignore[arg-type]
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.full((41,), 2.5))
    assert ((ids >= 0) & (ids < 8)).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_vocabulary_edges_of_hash_routing_vllm_50844_vllm_40862(dtype: torch.dtype) -> None:
    """The first and the last token id read their own rows, in either integer type."""
    vocab = 300
    table = torch.stack([(torch.arange(2) * 3 + t) % 8 for t in range(vocab)]).to(dtype)
    tokens = torch.tensor([0, vocab - 1, 255, 256])
    ids, weights = moe_gate(
        torch.randn(4, 6),
        torch.randn(8, 6),
        k=2,
        route_scale=1.0,
        tid2eid=table,
        token_ids=tokens,
    )
    assert ids.tolist() == [sorted(table[t].tolist()) for t in tokens.tolist()]
    assert weights.isfinite().all()


def test_missing_selections_are_minus_one_vllm_42072() -> None:
    """Every place of a row without enough candidates is -1, however many candidates there are."""
    for k in (1, 7, 64, 2048):
        scores = torch.full((66, 65), float("nan"))
        for row in range(66):
            scores[row, :row] = torch.randn(min(row, 65))
        for found in (
            topk_select(scores, k),
            topk_select(scores, k, row_end=torch.arange(66)),
            topk_merge(scores, torch.arange(65, dtype=torch.int32).expand(66, 65).contiguous(), k),
        ):
            count = (found >= 0).sum(1)
            assert count.tolist() == [min(row, 65, k) for row in range(66)]
            places = torch.arange(k)[None] >= count[:, None]
            assert (found[places] == -1).all()
