"""Torch twins: the plain op, then the codes and scales of what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quant.api import block_amax, fake_quant_fp8
from kernels.quant_rows.api import BLOCK, QuantRows, empty_quant_rows
from kernels.rms_norm.api import rms_norm
from kernels.swiglu.api import swiglu

_AMAX_FLOOR = 1e-4
_E4M3_MAX = 448.0


def quant_rows(x: Tensor, *, amax: Tensor | None = None, col_offset: int = 0) -> QuantRows:
    """See ``kernels.quant_rows.api.quant_rows``."""
    wide = x.float()
    peak = block_amax(wide, BLOCK, col_offset) if amax is None else amax
    bits = (peak.clamp(min=_AMAX_FLOOR) * (1.0 / _E4M3_MAX)).contiguous().view(torch.int32)
    byte = ((bits >> 23) + ((bits & 0x7FFFFF) != 0).int()).clamp(max=255)
    values = fake_quant_fp8(wide, BLOCK, amax, col_offset)
    columns = torch.arange(x.shape[1], device=x.device) + col_offset
    inverse = ((254 - byte) << 23).masked_fill(byte == 255, 0x7FC00000).view(torch.float32)
    out = empty_quant_rows(x.shape[0], x.shape[1], x.device, col_offset=col_offset)
    out.q.copy_((values * inverse[:, columns // BLOCK]).to(torch.float8_e4m3fn))
    out.scale.copy_(byte)
    return out


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, QuantRows]:
    """See ``kernels.quant_rows.api.rms_norm_quant``."""
    normed = rms_norm(x, weight, eps)
    return normed, quant_rows(normed)


def swiglu_quant(
    g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None
) -> QuantRows:
    """See ``kernels.quant_rows.api.swiglu_quant``."""
    return quant_rows(swiglu(g, u, limit=limit, row_weight=row_weight))
