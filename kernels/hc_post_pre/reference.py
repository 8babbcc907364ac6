"""Torch twin of ``hc_post_pre``: the two ops one after the other."""

from __future__ import annotations

from torch import Tensor

from kernels.hc.reference import hc_post, hc_pre


def hc_post_pre(
    a: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``kernels.hc_post_pre.api.hc_post_pre``."""
    streams = hc_post(a.to(x.dtype), x, post, comb)
    out, next_post, next_comb = hc_pre(
        streams, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps
    )
    return streams, out, next_post, next_comb
