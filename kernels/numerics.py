"""The three numerics a model can run in, as the two choices an op sees; the dtype of its inside."""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class Numerics(enum.Enum):
    """``model.numerics``.

    ``FP32``: weights dequantised, no other rounding. ``FP32_ROUNDED``: the official FP8/FP4 rounding
    steps, everything between them in float64 so that no rounding boundary is crossed by accumulation
    noise; for oracles. ``RELEASE``: the rounding steps and bf16 streams, as served.
    """

    FP32 = "fp32"
    FP32_ROUNDED = "fp32_rounded"
    RELEASE = "release"

    @property
    def quantize(self) -> bool:
        """Whether activations, KV latents and index vectors take the official rounding steps."""
        return self is not Numerics.FP32

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of streams and activations."""
        return _STREAMS[self]


_STREAMS = {
    Numerics.FP32: torch.float32,
    Numerics.FP32_ROUNDED: torch.float64,
    Numerics.RELEASE: torch.bfloat16,
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op computes in for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """``x`` in the dtype that an op computes in: float64 stays, everything else becomes float32."""
    return x.to(wide_dtype(x.dtype))
