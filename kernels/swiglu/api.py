"""Clamped SwiGLU, optionally with a routing weight per row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def swiglu(g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    """``(silu(min(g, limit)) * clamp(u, -limit, limit)) * row_weight``, float32 inside, one cast.

    Args:
        g: gate [N, I], float32 or bfloat16; may be a column slice of a fused product.
        u: up [N, I], same dtype.
        limit: clamp, > 0 (``swiglu_limit``).
        row_weight: float32 [N], multiplied before the cast; None for the shared expert.

    Returns:
        [N, I] in ``g.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device, or a limit that is not > 0.
    """
    dtypes = (torch.float32, torch.bfloat16)
    check_tensor("swiglu: g", g, shape=(None, None), dtype=dtypes)
    check_tensor("swiglu: u", u, shape=tuple(g.shape), dtype=g.dtype, beside=g)
    if not limit > 0:
        raise KernelContractError(f"swiglu: limit: expected a number > 0, got {limit}")
    if row_weight is not None:
        check_tensor(
            "swiglu: row_weight",
            row_weight,
            shape=(g.shape[0],),
            dtype=torch.float32,
            beside=g,
        )
    out: Tensor = kernel("swiglu", g.device)(g, u, limit=limit, row_weight=row_weight)
    return out
