"""RMSNorm with a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, float32 inside, one cast.

    Args:
        x: [.., d] float32 or bfloat16, any leading strides.
        weight: [d] float32 or bfloat16.
        eps: added to the mean square.

    Returns:
        [.., d] in ``x.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    dtypes = (torch.float32, torch.bfloat16)
    check_tensor("rms_norm: x", x, dtype=dtypes)
    if x.dim() == 0:
        raise KernelContractError("rms_norm: x: expected at least one dimension, got a scalar")
    check_tensor("rms_norm: weight", weight, shape=(x.shape[-1],), dtype=dtypes, beside=x)
    out: Tensor = kernel("rms_norm", x.device)(x, weight, eps)
    return out
