"""Torch twin of ``q_norm_rope``."""

from __future__ import annotations

from torch import Tensor

from kernels.rope.reference import apply_rope


def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """See ``kernels.q_norm_rope.api.q_norm_rope``."""
    normed = q * (q.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return apply_rope(normed, positions, inv_freq)
