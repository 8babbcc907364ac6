"""Torch twins of ``grouped_output`` and its FP8 form."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.api import PreparedWeight
from kernels.numerics import wide_dtype, widen
from kernels.quant_rows.api import QuantRows, quant_rows
from kernels.rope.reference import apply_rope

_CHUNK = 1 << 24  # values of o widened at once (64 MB in f32)


def grouped_output(
    o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: PreparedWeight, num_groups: int
) -> Tensor:
    """See ``kernels.grouped_output.api.grouped_output``."""
    tokens, heads, dim = o.shape
    matrix = wo_a.matrix.to(wide_dtype(o.dtype))
    groups = matrix.view(num_groups, matrix.shape[0] // num_groups, matrix.shape[1])
    out = torch.empty(tokens, matrix.shape[0], dtype=o.dtype, device=o.device)
    step = max(1, _CHUNK // max(1, heads * dim))
    for first in range(0, tokens, step):
        rows = slice(first, first + step)
        plain = apply_rope(o[rows], positions[rows], inv_freq, inverse=True)
        grouped = widen(plain).reshape(plain.shape[0], num_groups, -1).transpose(0, 1)
        out[rows] = (
            torch.bmm(grouped, groups.transpose(1, 2)).transpose(0, 1).flatten(1).to(o.dtype)
        )
    return out


def grouped_output_quant(
    o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: PreparedWeight, num_groups: int
) -> QuantRows:
    """See ``kernels.grouped_output.api.grouped_output_quant``."""
    return quant_rows(grouped_output(o, positions, inv_freq, wo_a, num_groups))
