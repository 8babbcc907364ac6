"""Torch twin of ``rms_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.numerics import widen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.rms_norm.api.rms_norm``."""
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)
