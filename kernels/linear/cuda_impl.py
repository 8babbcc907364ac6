"""CUDA: FP8 weights meet FP8 rows on the tensor cores, plain weights bf16 ones."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from kernels.linear import product, reference
from kernels.linear.api import PreparedWeight, WeightKind
from kernels.linear.device_weight import Fp8Weight, PlainWeight
from kernels.linear.reencode import fp8_from_fp4
from kernels.quant_gemm.api import linear_quant
from kernels.quant_gemm.pieces import weight_scale
from kernels.quant_rows.api import quant_rows
from kernels.weight import BlockWeight

_FLOATS = (torch.float32, torch.bfloat16)


def prepare_weight(weight: BlockWeight, *, dequantize: bool = False) -> PreparedWeight:
    """See ``kernels.linear.api.prepare_weight``.

    FP8 and plain weights are kept as they are (no copy). FP4 becomes FP8 where that loses nothing,
    and dequantised float32 where it would. ``dequantize`` makes bf16 values, float32 ones where bf16
    cannot hold them (scales near the ends of E8M0); it reads its verdict on the host.
    """
    data, scale = weight.data, weight.scale
    made: Fp8Weight | PlainWeight | None = None
    if scale is not None and dequantize:
        values = reference.prepare_weight(weight).matrix
        narrow = values.bfloat16()
        exact = torch.equal(narrow.float(), values)
        made = PlainWeight(
            data=narrow if exact else values,
            row_offset=weight.row_offset,
            col_offset=weight.col_offset,
        )
    elif scale is None:
        made = PlainWeight(data=data, row_offset=weight.row_offset, col_offset=weight.col_offset)
    elif data.dtype == torch.float8_e4m3fn:
        made = Fp8Weight(
            data=data,
            scale=scale,
            kind=WeightKind.FP8,
            row_offset=weight.row_offset,
            col_offset=weight.col_offset,
            float_scale=weight_scale(data, scale),
        )
    elif weight.row_offset == 0 and weight.col_offset == 0:
        codes = fp8_from_fp4(data, scale)
        if codes is not None:
            made = Fp8Weight(
                data=codes[0],
                scale=codes[1],
                kind=WeightKind.FP4,
                float_scale=weight_scale(*codes),
            )
    if made is None:
        return reference.prepare_weight(weight)
    return cast("PreparedWeight", made)  # the same interface, other storage


def build() -> None:
    """Compile now what a first call would compile."""
    product.build()


def linear(
    x: Tensor,
    w: PreparedWeight,
    *,
    quantize: bool,
    amax: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``kernels.linear.api.linear``; every row's bits are the same in any batch."""
    weight: object = w  # one of the classes that prepare_weight made
    dtype = x.dtype if out_dtype is None else out_dtype
    known = x.dtype in _FLOATS and dtype in _FLOATS
    if known and quantize and isinstance(weight, Fp8Weight):
        flat = x.reshape(-1, x.shape[-1])
        peaks = None if amax is None else amax.reshape(-1, amax.shape[-1])
        rows = quant_rows(flat, amax=peaks, col_offset=w.col_offset)
        out = linear_quant(rows, w, out_dtype=dtype)
        return out.view(*x.shape[:-1], w.out_features)
    if known and isinstance(weight, PlainWeight):
        count = math.prod(x.shape[:-1])
        out = _plain(x.reshape(count, x.shape[-1]), weight.data, dtype)
        return out.view(*x.shape[:-1], w.out_features)
    return reference.linear(x, w, quantize=quantize, amax=amax, out_dtype=out_dtype)


def _plain(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """``x w^T`` for values of float32 or bfloat16, summed in float32 without TF32."""
    left, right = _parts(x), _parts(w)
    if len(left) == len(right) == 1:
        return product.product(x, w, dtype)
    # All pairs of parts are exact products; one launch reads each operand once. A weight of one part is
    # not copied: ``early`` rests on it being older than the kernel ahead.
    rows, weight = torch.cat(left), right[0] if len(right) == 1 else torch.cat(right)
    pairs = product.product(rows, weight, torch.float32, early=weight is w).view(
        len(left), x.shape[0], len(right), w.shape[0]
    )
    order = sorted(
        ((i, j) for i in range(len(left)) for j in range(len(right))), key=lambda ij: -sum(ij)
    )
    out = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    for i, j in order:  # the smallest first
        out += pairs[i, :, j]
    return out.to(dtype)


def _parts(values: Tensor) -> list[Tensor]:
    """bf16 tensors whose sum is ``values``: a float32 value is the sum of three bf16 values."""
    if values.dtype == torch.bfloat16:
        return [values]
    high = values.bfloat16()
    rest = values - high.float()
    middle = rest.bfloat16()
    return [high, middle, (rest - middle.float()).bfloat16()]
