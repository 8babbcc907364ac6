"""float64 in the ops whose own tests stop at float32: everything inside is float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    BlockWeight,
    Numerics,
    block_amax,
    expert_ffn,
    fake_quant_fp4,
    fake_quant_fp8,
    hc_head,
    hc_post,
    hc_pre,
    linear,
    moe_gate,
    pack_fp4,
    prepare_experts,
    prepare_weight,
    quant_fp8_weight,
    rms_norm,
    swiglu,
    wide_dtype,
    widen,
)

F64 = torch.float64


def wide(*shape: int) -> Tensor:
    """Values that float32 cannot hold."""
    return torch.randn(*shape, dtype=F64)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype is F64
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_widen_and_the_oracle_numerics() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert wide_dtype(dtype) is torch.float32
        assert widen(torch.zeros(1, dtype=dtype)).dtype is torch.float32
    x = wide(3)
    assert widen(x) is x
    assert [n.dtype for n in Numerics] == [torch.float32, F64, torch.bfloat16]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_linear(fp8: bool, quantize: bool) -> None:
    w = torch.randn(70, 288)
    weight = prepare_weight(BlockWeight(*(quant_fp8_weight(w) if fp8 else pack_fp4(w))))
    x = wide(9, 288)
    x_in = fake_quant_fp8(x, 128) if quantize else x
    close(linear(x, weight, quantize=quantize), x_in @ weight.matrix.double().T)
    assert linear(x, weight, quantize=quantize, out_dtype=torch.float32).dtype is torch.float32
    amax = block_amax(x, 128)
    close(linear(x, weight, quantize=quantize, amax=amax), x_in @ weight.matrix.double().T)


def test_official_rounding_sees_float32_values() -> None:
    x = wide(5, 128) * 3
    for rounded, single in (
        (fake_quant_fp8(x, 64), fake_quant_fp8(x.float(), 64)),
        (fake_quant_fp4(x), fake_quant_fp4(x.float())),
    ):
        assert rounded.dtype is F64
        assert torch.equal(rounded, single.double())
    # One bit above the tie in float64, on the tie in float32: the even neighbour.
    tie = torch.tensor([[448.0, 42.0 + 1e-9] + [0.0] * 62], dtype=F64)
    assert fake_quant_fp8(tie, 64)[0, 1] == 40.0


def test_experts_and_swiglu() -> None:
    def block(n: int, k: int) -> BlockWeight:
        return BlockWeight(*pack_fp4(torch.randn(n, k) * 0.4))

    lists = [[block(64, 96) for _ in range(3)], [block(64, 96) for _ in range(3)]]
    experts = prepare_experts(*lists, [block(96, 64) for _ in range(3)])
    x, weight = wide(7, 96), torch.rand(7, dtype=F64)
    bounds = [0, 2, 2, 7]
    got = expert_ffn(x, torch.tensor(bounds), weight, experts, limit=4.0, quantize=False)
    for e in range(3):
        part = slice(bounds[e], bounds[e + 1])
        w1, w3, w2 = (ws[e].matrix.double() for ws in (experts.w1, experts.w3, experts.w2))
        g, u = x[part] @ w1.T, x[part] @ w3.T
        a = F.silu(g.clamp(max=4.0)) * u.clamp(-4.0, 4.0) * weight[part, None]
        close(swiglu(g, u, limit=4.0, row_weight=weight[part]), a)
        close(got[part], a @ w2.T)


def test_rms_norm() -> None:
    x, weight = wide(4, 96), torch.randn(96)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(rms_norm(x, weight, 1e-6), want)


def test_moe_gate() -> None:
    x, gate, bias = wide(40, 64) * 2, torch.randn(16, 64) * 0.5, torch.randn(16)
    scores = F.softplus(x @ gate.double().T).sqrt()
    ids, weights = moe_gate(x, gate, k=6, route_scale=1.5, bias=bias)
    best = (scores + bias).topk(6).indices.sort().values
    assert torch.equal(ids, best)
    chosen = scores.gather(1, best)
    close(weights, chosen / chosen.sum(1, keepdim=True) * 1.5)


def test_hyper_connections() -> None:
    x, fn = wide(6, 4, 40), torch.randn(24, 160) * 0.1
    scale, base = torch.rand(3), torch.randn(24)
    flat = x.flatten(1)
    mix = flat @ fn.double().T / (flat.square().mean(1, keepdim=True) + 1e-6).sqrt()
    pre = (mix[:, :4] * scale[0] + base[:4]).sigmoid() + 1e-6
    post = 2 * (mix[:, 4:8] * scale[1] + base[4:8]).sigmoid()
    comb = (mix[:, 8:] * scale[2] + base[8:]).view(6, 4, 4).softmax(2) + 1e-6
    comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    got = hc_pre(x, fn, scale, base, iters=1, eps=1e-6, norm_eps=1e-6)
    for part, want in zip(got, ((pre[..., None] * x).sum(1), post, comb), strict=True):
        close(part, want)
    a = wide(6, 40)
    want = post[..., None] * a[:, None] + torch.einsum("tjk,tjd->tkd", comb, x)
    close(hc_post(a, x, post, comb), want)
    head = hc_head(x, fn[:4], scale[:1], base[:4], eps=1e-6, norm_eps=1e-6)
    close(head, (pre[..., None] * x).sum(1))
