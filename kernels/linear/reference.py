"""Torch twin of ``linear``: dequantise once, then float32 or float64 products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.linear.api import BLOCK, PreparedWeight, WeightKind
from kernels.numerics import widen
from kernels.quant.api import dequant_fp4, dequant_fp8, fake_quant_fp8
from kernels.weight import BlockWeight


def prepare_weight(weight: BlockWeight, *, dequantize: bool = False) -> PreparedWeight:
    """See ``kernels.linear.api.prepare_weight``."""
    data, scale = weight.data, weight.scale
    if scale is None:
        matrix, kind = data.float(), WeightKind.PLAIN
    elif data.dtype == torch.int8:
        if weight.row_offset:
            raise KernelContractError(
                f"prepare_weight: row_offset: expected 0 for FP4 data, got {weight.row_offset}"
            )
        matrix, kind = dequant_fp4(data, scale), WeightKind.FP4
    else:
        matrix = dequant_fp8(data, scale, weight.row_offset, weight.col_offset)
        kind = WeightKind.FP8
    kind = WeightKind.PLAIN if dequantize else kind
    return PreparedWeight(
        matrix=matrix, kind=kind, row_offset=weight.row_offset, col_offset=weight.col_offset
    )


def round_activations(
    x: Tensor, w: PreparedWeight, *, quantize: bool, amax: Tensor | None = None
) -> Tensor:
    """What a product with ``w`` reads: ``x`` widened, after AQ where the format asks for it."""
    if quantize and w.kind.rounds_activations:
        x = fake_quant_fp8(x, BLOCK, amax, w.col_offset)
    return widen(x)


def linear(
    x: Tensor,
    w: PreparedWeight,
    *,
    quantize: bool,
    amax: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``kernels.linear.api.linear``."""
    x_in = round_activations(x, w, quantize=quantize, amax=amax)
    # The matrix is exact in float32, so for float64 rows it is widened here and not kept twice.
    out = F.linear(x_in, w.matrix.to(x_in.dtype))
    return out.to(x.dtype if out_dtype is None else out_dtype)
