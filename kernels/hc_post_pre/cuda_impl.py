"""``hc_post_pre`` on the GPU: the kernel of ``hc_pre`` makes the new streams as it reads the old ones."""

from __future__ import annotations

from torch import Tensor

from kernels.hc.cuda_impl import collapse
from kernels.hc_post_pre import reference
from kernels.triton_math import twin_for_float64


@twin_for_float64(reference.hc_post_pre)
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
    return collapse(
        x, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps, mixed=(a, post, comb)
    )
