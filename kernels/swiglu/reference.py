"""Torch twin of ``swiglu``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.numerics import widen


def swiglu(g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    """See ``kernels.swiglu.api.swiglu``."""
    hidden = F.silu(widen(g).clamp(max=limit)) * widen(u).clamp(-limit, limit)
    if row_weight is not None:
        hidden = hidden * row_weight.to(hidden.dtype).unsqueeze(-1)
    return hidden.to(g.dtype)
