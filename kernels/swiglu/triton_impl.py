"""Clamped SwiGLU, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.swiglu import reference
from kernels.triton_math import padded, twin_for_float64

_COLUMNS = 2048


@triton.jit
def _swiglu(
    g, u, row_weight, out, stride_g, stride_u, limit, I: tl.constexpr, P: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * P + tl.arange(0, P)
    inside = col < I
    gate = tl.load(g + row * stride_g + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * stride_u + col, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        hidden = hidden * tl.load(row_weight + row)
    tl.store(out + row * I + col, hidden.to(out.dtype.element_ty), mask=inside)


@twin_for_float64(reference.swiglu)
def swiglu(g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    """See ``kernels.swiglu.api.swiglu``."""
    rows, width = g.shape
    out = torch.empty((rows, width), dtype=g.dtype, device=g.device)
    if out.numel():
        block = min(_COLUMNS, padded(width, 64))
        _swiglu[(rows, triton.cdiv(width, block))](
            g, u, row_weight, out, g.stride(0), u.stride(0), limit, I=width, P=block,
            WEIGHTED=row_weight is not None, num_warps=max(1, block // 512),
        )  # fmt: skip
    return out
