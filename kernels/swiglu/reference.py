"""Torch twin of ``swiglu``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    """See ``kernels.swiglu.api.swiglu``."""
    hidden = F.silu(g.float().clamp(max=limit)) * u.float().clamp(-limit, limit)
    if row_weight is not None:
        hidden = hidden * row_weight.unsqueeze(-1)
    return hidden.to(g.dtype)
