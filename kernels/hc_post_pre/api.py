"""``hc_post_pre``: ``hc_post`` of one sub-layer and ``hc_pre`` of the next in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import check_tensor
from kernels.dispatch import kernel
from kernels.hc.api import check_finished, check_mix

_FLOATS = (torch.float32, torch.bfloat16)


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
    """``streams = hc_post(a, x, post, comb)``, then ``hc_pre(streams, fn, scale, base)``.

    Args:
        a: the finished sub-layer's output [T, D], in ``x.dtype``, or float32, which is rounded to
            ``x.dtype`` first.
        x: its streams [T, R, D] float32 or bfloat16.
        post: float32 [T, R] of its ``hc_pre``.
        comb: float32 [T, R, R] of its ``hc_pre``, [source, destination].
        fn: float32 [(2 + R) * R, R * D] of the next sub-layer.
        scale: float32 [3].
        base: float32 [(2 + R) * R].
        iters: column normalisations, >= 1.
        eps: ``hc_eps``.
        norm_eps: ``rms_norm_eps``.

    Returns:
        ``(streams, out, post, comb)``: new streams [T, R, D] and the next input [T, D] in ``x.dtype``,
        and the next float32 [T, R] and [T, R, R].

    Raises:
        KernelContractError: wrong shape, dtype or device, or ``iters`` < 1.
    """
    check_tensor("hc_post_pre: x", x, shape=(None, None, None), dtype=_FLOATS)
    check_finished("hc_post_pre", a, x, post, comb, (x.dtype, torch.float32))
    check_mix("hc_post_pre", x, fn, scale, base, iters)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = kernel("hc_post_pre", x.device)(
        a, x, post, comb, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps
    )
    return result
