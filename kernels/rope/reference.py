"""Torch twin of ``apply_rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.numerics import widen


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """See ``kernels.rope.api.apply_rope``."""
    pairs = inv_freq.numel()
    # The product is rounded to f32 before cos/sin: the official tables are made that way.
    angles = positions.to(torch.float32)[:, None] * inv_freq.to(torch.float32)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (pairs,)
    keep = x.shape[-1] - 2 * pairs
    tail = widen(x[..., keep:])
    angles = angles.to(tail.dtype)
    cos, sin = angles.cos().view(shape), angles.sin().view(shape)
    if inverse:
        sin = -sin
    even, odd = tail[..., 0::2], tail[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :keep], rotated.to(x.dtype)), dim=-1)
