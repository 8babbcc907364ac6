"""``q_norm_rope``: weightless per-head norm of the query, then RoPE."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import check_tensor
from kernels.dispatch import kernel
from kernels.rope.api import check_rope_inputs


def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """``q * rsqrt(mean(q^2) + eps)`` per head, then RoPE on the last ``2 * len(inv_freq)`` dims.

    As in the official code the norm is an expression in ``q.dtype``: in bfloat16 the square, the
    mean, the rsqrt and the product are each rounded. RoPE is f32 inside with one cast.

    Args:
        q: float32 or bfloat16 [T, H, d].
        positions: int64 [T].
        inv_freq: float32 [r/2].
        eps: added to the mean of squares.

    Returns:
        [T, H, d] in ``q.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    check_tensor(
        "q_norm_rope: q", q, shape=(None, None, None), dtype=(torch.float32, torch.bfloat16)
    )
    check_rope_inputs("q_norm_rope", q, positions, inv_freq)
    result: Tensor = kernel("q_norm_rope", q.device)(q, positions, inv_freq, eps)
    return result
