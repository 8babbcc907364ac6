"""Torch twins: the values of the rows, then the plain products."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.grouped_gemm.api import PreparedExperts, expert_ffn
from kernels.linear.api import PreparedWeight, linear
from kernels.quant_rows.api import QuantRows


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.quant_gemm.api.linear_quant``."""
    return linear(rows.values(), w, quantize=False, out_dtype=out_dtype)


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
