"""Torch twin of ``merge_lse``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.numerics import wide_dtype

_NEG_INF = float("-inf")


def merge_lse(o: Tensor, lse: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels.merge_lse.api.merge_lse``."""
    wide = wide_dtype(o.dtype)
    lse = lse.to(wide)
    top = lse.amax(dim=0)
    empty = top == _NEG_INF
    top = top.masked_fill(empty, 0.0)  # -inf - -inf would be NaN
    weight = (lse - top).exp()
    total = weight.sum(dim=0)
    denominator = total if sink is None else total + (sink.to(wide) - top).exp()
    numerator = torch.zeros(o.shape[1:], dtype=wide, device=o.device)
    for part, w, part_lse in zip(o, weight, lse, strict=True):
        ignored = (part_lse == _NEG_INF)[..., None]
        numerator += w[..., None] * part.to(wide).masked_fill(ignored, 0.0)
    merged = numerator / denominator.masked_fill(empty, 1.0)[..., None]
    return merged.to(o.dtype), (total.log() + top).masked_fill(empty, _NEG_INF)
