"""Torch twins of the hyper-connection ops. Everything is float32 until the last cast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _mix(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """[T, rows of fn]: the product first, then the token's norm factor."""
    flat = x.float().flatten(1)
    norm = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn) * norm


def _collapse(x: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)


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
    mixed = torch.matmul(comb.transpose(1, 2), x.float())
    return (post.unsqueeze(-1) * a.float().unsqueeze(1) + mixed).to(x.dtype)


def hc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See ``kernels.hc.api.hc_head``."""
    weights = torch.sigmoid(_mix(x, fn, norm_eps) * scale + base) + eps
    return _collapse(x, weights)
