"""``hc_pre_norm`` and ``hc_post_pre_norm`` on the GPU: one launch, and comb's for many tokens."""

from __future__ import annotations

from torch import Tensor

from kernels.hc.cuda_impl import collapse_norm
from kernels.hc_norm import reference
from kernels.quant_rows.api import QuantRows
from kernels.triton_math import twin_for_float64


@twin_for_float64(reference.hc_pre_norm)
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
    _, normed, rows, post, comb = collapse_norm(
        x,
        fn,
        scale,
        base,
        norm_weight,
        iters=iters,
        eps=eps,
        norm_eps=norm_eps,
        rms_eps=rms_eps,
    )
    return normed, rows, post, comb


@twin_for_float64(reference.hc_post_pre_norm)
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
    return collapse_norm(
        x,
        fn,
        scale,
        base,
        norm_weight,
        iters=iters,
        eps=eps,
        norm_eps=norm_eps,
        rms_eps=rms_eps,
        mixed=(a, post, comb),
    )
