"""Rows on their way into products.

In the numerics that are served (bf16 rows) a producer hands out its rows together with their FP8
form, and every FP8 product reads that one. In the two others, which are for exactness (fp32,
fp32_rounded), each product rounds its rows itself, in wide arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import (
    Numerics,
    PreparedWeight,
    QuantRows,
    StackedWeight,
    linear,
    linear_quant,
    linear_swiglu_quant,
    rms_norm,
    rms_norm_quant,
    swiglu,
    swiglu_quant,
)
from model.parallel.row_bytes import slice_rows


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows [T, k].

    Args:
        values: the rows; None where every reader takes the FP8 form.
        quant: their FP8 form; None in the exact numerics.
    """

    values: Tensor | None
    quant: QuantRows | None

    def wide(self) -> Tensor:
        """The rows as they are, for products without rounding."""
        if self.values is None:
            raise ValueError("these activations exist in FP8 only")
        return self.values

    def slice(self, start: int, stop: int) -> Activations:
        """Rows ``start:stop``, as views."""
        values = None if self.values is None else self.values[start:stop]
        quant = None if self.quant is None else slice_rows(self.quant, start, stop)
        return Activations(values, quant)


class Projector:
    """How rows are normed and multiplied in one of the three numerics.

    Args:
        numerics: arithmetic of the model.
    """

    def __init__(self, numerics: Numerics) -> None:
        self.fused = numerics is Numerics.RELEASE
        self.quantize, self.dtype = numerics.quantize, numerics.dtype

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Activations:
        """RMSNorm of rows [T, k]."""
        if self.fused:
            return Activations(*rms_norm_quant(x, weight, eps))
        return Activations(rms_norm(x, weight, eps), None)

    def product(
        self, x: Activations, w: PreparedWeight, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """``x w^T`` [T, n] in ``out_dtype`` (None: the streams' dtype)."""
        dtype = self.dtype if out_dtype is None else out_dtype
        if x.quant is not None and w.kind.rounds_activations:
            return linear_quant(x.quant, w, out_dtype=dtype)
        return linear(x.wide(), w, quantize=self.quantize, out_dtype=dtype)

    def gated(
        self, x: Activations, gate_up: StackedWeight, reader: PreparedWeight, limit: float
    ) -> Activations:
        """Clamped SwiGLU of the two products of ``gate_up`` [T, k], read by one weight."""
        w = gate_up.weight
        fp8 = self.fused and reader.kind.rounds_activations
        whole = 2 * gate_up.columns[1].start == w.out_features  # two halves, no padding
        if fp8 and whole and x.quant is not None and w.kind.rounds_activations:
            rows = linear_swiglu_quant(x.quant, w, limit=limit, hidden_dtype=self.dtype)
            return Activations(None, rows)
        gate, up = gate_up.split(self.product(x, w))
        if fp8:
            return Activations(None, swiglu_quant(gate, up, limit=limit))
        return Activations(swiglu(gate, up, limit=limit), None)
