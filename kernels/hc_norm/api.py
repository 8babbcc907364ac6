"""``hc_pre`` and ``hc_post_pre`` with the sub-layer's RMSNorm and the FP8 rounding behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import check_tensor
from kernels.dispatch import kernel
from kernels.hc.api import check_finished, check_mix
from kernels.quant_rows.api import QuantRows

_FLOATS = (torch.float32, torch.bfloat16)


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
    """``out, post, comb = hc_pre(x, ..)``, then ``rms_norm_quant(out, norm_weight, rms_eps)``.

    Args:
        x: streams [T, R, D] float32 or bfloat16.
        fn: float32 [(2 + R) * R, R * D].
        scale: float32 [3].
        base: float32 [(2 + R) * R].
        norm_weight: [D] float32 or bfloat16, of the sub-layer's RMSNorm.
        iters: column normalisations, >= 1.
        eps: ``hc_eps``.
        norm_eps: of the mix, as in ``hc_pre``.
        rms_eps: of the RMSNorm.

    Returns:
        ``(normed, rows, post, comb)``: [T, D] in ``x.dtype``, its FP8 form, float32 [T, R] and
        [T, R, R]. The collapsed row itself (rounded to ``x.dtype`` before the norm) is not handed out.

    Raises:
        KernelContractError: wrong shape, dtype or device, or ``iters`` < 1.
    """
    check_tensor("hc_pre_norm: x", x, shape=(None, None, None), dtype=_FLOATS)
    _check("hc_pre_norm", x, fn, scale, base, norm_weight, iters)
    result: tuple[Tensor, QuantRows, Tensor, Tensor] = kernel("hc_pre_norm", x.device)(
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
    return result


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
    """``streams = hc_post(a, x, post, comb)``, then ``hc_pre_norm(streams, ..)``.

    Args:
        a: the finished sub-layer's output [T, D], in ``x.dtype``, or float32, which is rounded to
            ``x.dtype`` first.
        x: its streams [T, R, D] float32 or bfloat16.
        post: float32 [T, R] of its ``hc_pre``.
        comb: float32 [T, R, R] of its ``hc_pre``, [source, destination].
        fn: float32 [(2 + R) * R, R * D] of the next sub-layer.
        scale: float32 [3].
        base: float32 [(2 + R) * R].
        norm_weight: [D] float32 or bfloat16, of the next sub-layer's RMSNorm.
        iters: column normalisations, >= 1.
        eps: ``hc_eps``.
        norm_eps: of the mix, as in ``hc_pre``.
        rms_eps: of the RMSNorm.

    Returns:
        ``(streams, normed, rows, post, comb)``: new streams [T, R, D] in ``x.dtype``, and the rest as
        ``hc_pre_norm`` gives it.

    Raises:
        KernelContractError: wrong shape, dtype or device, or ``iters`` < 1.
    """
    check_tensor("hc_post_pre_norm: x", x, shape=(None, None, None), dtype=_FLOATS)
    check_finished("hc_post_pre_norm", a, x, post, comb, (x.dtype, torch.float32))
    _check("hc_post_pre_norm", x, fn, scale, base, norm_weight, iters)
    result: tuple[Tensor, Tensor, QuantRows, Tensor, Tensor] = kernel("hc_post_pre_norm", x.device)(
        a,
        x,
        post,
        comb,
        fn,
        scale,
        base,
        norm_weight,
        iters=iters,
        eps=eps,
        norm_eps=norm_eps,
        rms_eps=rms_eps,
    )
    return result


def _check(
    op: str,
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    iters: int,
) -> None:
    check_mix(op, x, fn, scale, base, iters)
    shape = (x.shape[2],)
    check_tensor(f"{op}: norm_weight", norm_weight, shape=shape, dtype=_FLOATS, beside=x)
