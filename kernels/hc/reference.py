"""Torch twins of the hyper-connection ops. Everything is float32 (float64 for float64
streams) until the last cast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.numerics import wide_dtype, widen


def _mix(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """[T, rows of fn]: the product first, then the token's norm factor."""
    flat = widen(x).flatten(1)
    norm = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn.to(flat.dtype)) * norm


def _collapse(x: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * widen(x)).sum(1).to(x.dtype)


def hc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.hc.api.hc_pre``."""
    r = x.shape[1]
    mix = _mix(x, fn, norm_eps)
    scale, base = scale.to(mix.dtype), base.to(mix.dtype)
    pre = torch.sigmoid(mix[:, :r] * scale[0] + base[:r]) + eps
    post = 2 * torch.sigmoid(mix[:, r : 2 * r] * scale[1] + base[r : 2 * r])
    comb = torch.unflatten(mix[:, 2 * r :] * scale[2] + base[2 * r :], -1, (r, r))
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return _collapse(x, pre), post, comb


def hc_post(a: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ``kernels.hc.api.hc_post``."""
    wide = wide_dtype(x.dtype)
    mixed = torch.matmul(comb.to(wide).transpose(1, 2), x.to(wide))
    return (post.to(wide).unsqueeze(-1) * a.to(wide).unsqueeze(1) + mixed).to(x.dtype)


def hc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See ``kernels.hc.api.hc_head``."""
    mix = _mix(x, fn, norm_eps)
    weights = torch.sigmoid(mix * scale.to(mix.dtype) + base.to(mix.dtype)) + eps
    return _collapse(x, weights)
