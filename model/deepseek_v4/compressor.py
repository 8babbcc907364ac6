"""Gated pooling of token rows into compressed entries (main latents and indexer keys).

The rows, ``[u | g]``, come from one product for all compressors of a layer (``entries.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import CompressPart, PageLayout, compress

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config


class Compressor:
    """One compressor: pooling, norm, RoPE and rounding of the pooled entry.

    Args:
        config: the model's shape.
        weights: where ``<prefix>.ape`` and the norm are taken from.
        prefix: checkpoint prefix, e.g. ``layers.2.attn.compressor``.
        ratio: tokens per group, 4 (overlapping) or 128.
        index: True for the indexer's compressor (Hadamard + FP4 instead of FP8 rounding).
        inv_freq: RoPE frequencies of the layer, float32 [rope / 2].
        quantize: take the official rounding steps.
        dtype: dtype of the entries.
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        weights: WeightDict,
        prefix: str,
        *,
        ratio: int,
        index: bool,
        inv_freq: Tensor,
        quantize: bool,
        dtype: torch.dtype,
    ) -> None:
        self.ratio, self.index, self.quantize, self.dtype = ratio, index, quantize, dtype
        self.inv_freq = inv_freq
        self.eps = config.rms_norm_eps
        self.ape = weights.tensor(f"{prefix}.ape")
        self.norm = weights.tensor(f"{prefix}.norm.weight")

    @property
    def width(self) -> int:
        """Values of a row: u, then g."""
        return 2 * self.ape.shape[1]

    @property
    def ape_rows(self) -> Tensor:
        """``ape`` as rows [ratio, width] that leave u as it is when they are added."""
        # x + 0.0 would lose the sign of -0.0, x - 0.0 does not.
        return torch.cat([torch.full_like(self.ape, -0.0), self.ape], 1)

    def part(self, pool: Tensor, layout: PageLayout, slots: Tensor) -> CompressPart:
        """This compressor's share of a decode step: its constants, and where entries go."""
        return CompressPart(
            ape=self.ape,
            norm_weight=self.norm,
            pool=pool,
            layout=layout,
            slots=slots,
        )

    def pool(self, rows: Tensor, row_index: Tensor, positions: Tensor) -> Tensor:
        """Pool rows [N, 2 * w] into entries [E, d]; ``row_index`` [E, 8 or 128], -1 = none."""
        return compress(
            rows,
            row_index,
            self.norm,
            positions,
            self.inv_freq,
            self.eps,
            ratio=self.ratio,
            index=self.index,
            quantize=self.quantize,
            dtype=self.dtype,
        )
