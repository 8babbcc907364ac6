"""Torch twins: the values of the rows, then the plain products."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.grouped_gemm.api import PreparedExperts, expert_ffn
from kernels.linear.api import PreparedWeight, linear
from kernels.quant_rows.api import QuantRows, swiglu_quant


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.quant_gemm.api.linear_quant``."""
    return linear(rows.values(), w, quantize=False, out_dtype=out_dtype)


def linear_swiglu_quant(
    rows: QuantRows, w: PreparedWeight, *, limit: float, hidden_dtype: torch.dtype
) -> QuantRows:
    """See ``kernels.quant_gemm.api.linear_swiglu_quant``."""
    gate, up = linear_quant(rows, w, out_dtype=hidden_dtype).chunk(2, dim=1)
    return swiglu_quant(gate, up, limit=limit)


def expert_ffn_quant(
    rows: QuantRows,
    offsets: Tensor,
    row_weight: Tensor,
    experts: PreparedExperts,
    *,
    limit: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See ``kernels.quant_gemm.api.expert_ffn_quant``."""
    # The values are e4m3 times powers of two: exact in either dtype, and rounded to themselves again.
    x = rows.values().to(out_dtype)
    return expert_ffn(x, offsets, row_weight, experts, limit=limit, quantize=True)
