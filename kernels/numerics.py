"""The three numerics a model can run in, as the two choices an op sees."""

from __future__ import annotations

import enum

import torch


class Numerics(enum.Enum):
    """``model.numerics``.

    ``FP32``: weights dequantised, no other rounding. ``FP32_ROUNDED``: fp32 arithmetic with the
    official FP8/FP4 rounding steps. ``RELEASE``: the rounding steps and bf16 streams, as served.
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
        return torch.bfloat16 if self is Numerics.RELEASE else torch.float32
