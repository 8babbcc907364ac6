"""``apply_rope``: rotate the last dimensions of each row by its position."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last ``r = 2 * len(inv_freq)`` dims as interleaved pairs (2i, 2i+1).

    Args:
        x: float32 or bfloat16 [T, d] or [T, H, d].
        positions: int64 [T].
        inv_freq: float32 [r/2]; the angle is f32(position) * inv_freq, rounded to f32 once,
            also for float64 rows.
        inverse: rotate back (sin -> -sin).

    Returns:
        A new tensor like ``x``; math in f32, one cast.

    Raises:
        KernelContractError: wrong rank, shape, dtype or device, or r > d.
    """
    if x.dim() not in (2, 3):
        raise KernelContractError(
            f"apply_rope: x: expected shape [T, d] or [T, H, d], got {list(x.shape)}"
        )
    check_tensor("apply_rope: x", x, dtype=(torch.float32, torch.bfloat16))
    check_rope_inputs("apply_rope", x, positions, inv_freq)
    result: Tensor = kernel("apply_rope", x.device)(x, positions, inv_freq, inverse)
    return result


def check_rope_inputs(op: str, x: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    """Check ``positions`` [T] and ``inv_freq`` [r/2] against rows ``x`` [T, ..., d].

    Raises:
        KernelContractError: see ``apply_rope``.
    """
    check_tensor(f"{op}: positions", positions, shape=(x.shape[0],), dtype=torch.int64, beside=x)
    check_inv_freq(op, inv_freq, x.shape[-1], x)


def check_inv_freq(op: str, inv_freq: Tensor, dim: int, beside: Tensor) -> None:
    """Check ``inv_freq`` [r/2] against rows of ``dim`` values, beside the op's first tensor.

    Raises:
        KernelContractError: see ``apply_rope``.
    """
    check_tensor(f"{op}: inv_freq", inv_freq, shape=(None,), dtype=torch.float32, beside=beside)
    if 2 * inv_freq.numel() > dim:
        raise KernelContractError(
            f"{op}: inv_freq has {inv_freq.numel()} values for {2 * inv_freq.numel()} rotary dims,"
            f" but rows have {dim}"
        )
