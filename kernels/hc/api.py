"""Hyper-connections: R residual streams are collapsed before a sub-layer and mixed after it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel

_FLOATS = (torch.float32, torch.bfloat16)


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
    """Collapse the streams to a sub-layer's input, and make the factors that ``hc_post`` needs.

    All in float32. ``mix = (flat @ fn^T) * rsqrt(mean(flat^2) + norm_eps)`` over the R * D values
    of a token; ``pre = sigmoid(..) + eps``, ``post = 2 sigmoid(..)``. comb starts as a row softmax
    plus eps and a column normalisation, then come ``iters - 1`` times rows and columns (each
    divides by sum + eps), so its columns are normalised last.

    Args:
        x: streams [T, R, D] float32 or bfloat16.
        fn: float32 [(2 + R) * R, R * D]; rows: R pre, R post, R * R comb (source-major).
        scale: float32 [3], of pre, post and comb.
        base: float32 [(2 + R) * R].
        iters: column normalisations, >= 1 (``hc_sinkhorn_iters``).
        eps: ``hc_eps``.
        norm_eps: ``rms_norm_eps``.

    Returns:
        ``(out, post, comb)``: [T, D] in ``x.dtype``; float32 [T, R]; float32 [T, R, R] as [source,
        destination].

    Raises:
        KernelContractError: wrong shape, dtype or device, or ``iters`` < 1.
    """
    check_tensor("hc_pre: x", x, shape=(None, None, None), dtype=_FLOATS)
    check_mix("hc_pre", x, fn, scale, base, iters)
    out: tuple[Tensor, Tensor, Tensor] = kernel("hc_pre", x.device)(
        x, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps
    )
    return out


def hc_post(a: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``X'_k = post_k * a + sum_j comb[j, k] * X_j``, float32 inside, one cast.

    Args:
        a: the sub-layer's output [T, D], same dtype as ``x``.
        x: streams [T, R, D] float32 or bfloat16.
        post: float32 [T, R].
        comb: float32 [T, R, R], [source, destination].

    Returns:
        New streams [T, R, D] in ``x.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    check_tensor("hc_post: x", x, shape=(None, None, None), dtype=_FLOATS)
    check_finished("hc_post", a, x, post, comb, (x.dtype,))
    out: Tensor = kernel("hc_post", x.device)(a, x, post, comb)
    return out


def hc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """Collapse the streams once at the end: as ``hc_pre``'s ``out``, with its own weights.

    Args:
        x: streams [T, R, D] float32 or bfloat16.
        fn: float32 [R, R * D].
        scale: float32 [1].
        base: float32 [R].
        eps: ``hc_eps``.
        norm_eps: ``rms_norm_eps``.

    Returns:
        [T, D] in ``x.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    check_tensor("hc_head: x", x, shape=(None, None, None), dtype=_FLOATS)
    _check_params("hc_head", x, fn, scale, base, x.shape[1], 1)
    out: Tensor = kernel("hc_head", x.device)(x, fn, scale, base, eps=eps, norm_eps=norm_eps)
    return out


def check_mix(op: str, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iters: int) -> None:
    """Check what ``hc_pre`` makes its factors of, for streams ``x`` [T, R, D].

    Raises:
        KernelContractError: see ``hc_pre``.
    """
    streams = x.shape[1]
    _check_params(op, x, fn, scale, base, (2 + streams) * streams, 3)
    if iters < 1:
        raise KernelContractError(f"{op}: iters: expected >= 1, got {iters}")


def check_finished(
    op: str, a: Tensor, x: Tensor, post: Tensor, comb: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check the output ``a`` of a sub-layer, in one of ``dtypes``, and what mixes it into ``x``.

    Raises:
        KernelContractError: see ``hc_post``.
    """
    rows, streams, width = x.shape
    single = (torch.float32,)
    for name, tensor, shape, dtype in (
        ("a", a, (rows, width), dtypes),
        ("post", post, (rows, streams), single),
        ("comb", comb, (rows, streams, streams), single),
    ):
        check_tensor(f"{op}: {name}", tensor, shape=shape, dtype=dtype, beside=x)


def _check_params(
    op: str, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, mixes: int, scales: int
) -> None:
    for name, tensor, shape in (
        ("fn", fn, (mixes, x.shape[1] * x.shape[2])),
        ("scale", scale, (scales,)),
        ("base", base, (mixes,)),
    ):
        check_tensor(f"{op}: {name}", tensor, shape=shape, dtype=torch.float32, beside=x)
