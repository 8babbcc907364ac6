"""Torch twins: the ops one after the other."""

from __future__ import annotations

from torch import Tensor

from kernels.hc.reference import hc_post, hc_pre
from kernels.quant_rows.api import QuantRows
from kernels.quant_rows.reference import rms_norm_quant


def hc_pre_norm(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    rms_eps: float,
) -> tuple[Tensor, QuantRows, Tensor, Tensor]:
    """See ``kernels.hc_norm.api.hc_pre_norm``."""
    out, post, comb = hc_pre(x, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps)
    normed, rows = rms_norm_quant(out, norm_weight, rms_eps)
    return normed, rows, post, comb


def hc_post_pre_norm(
    a: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, QuantRows, Tensor, Tensor]:
    """See ``kernels.hc_norm.api.hc_post_pre_norm``."""
    streams = hc_post(a.to(x.dtype), x, post, comb)
    rest = hc_pre_norm(
        streams,
        fn,
        scale,
        base,
        norm_weight,
        iters=iters,
        eps=eps,
        norm_eps=norm_eps,
        rms_eps=rms_eps,
    )
    return streams, *rest
