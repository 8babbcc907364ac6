"""Torch twin of ``index_query``, and the rotation that index keys share."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.numerics import widen
from kernels.quant.reference import fake_quant_fp4
from kernels.rope.reference import apply_rope


def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, quantize: bool) -> Tensor:
    """See ``kernels.index_query.api.index_query``."""
    rotated = apply_rope(q, positions, inv_freq)
    return fake_quant_fp4(hadamard(rotated)) if quantize else rotated


def hadamard(x: Tensor) -> Tensor:
    """``n^-1/2 * x @ S`` over the last dim (n a power of two), S[i, j] = (-1)^popcount(i & j).

    The sums are f32 (f64 for f64), scaled at the end, cast once to ``x.dtype``.
    """
    n, wide = x.shape[-1], widen(x)
    sylvester = torch.ones(1, 1, dtype=wide.dtype, device=x.device)
    while sylvester.shape[0] < n:
        top = torch.cat((sylvester, sylvester), dim=1)
        sylvester = torch.cat((top, torch.cat((sylvester, -sylvester), dim=1)), dim=0)
    rotated = wide @ sylvester
    return rotated.mul_(float(n) ** -0.5).to(x.dtype)
