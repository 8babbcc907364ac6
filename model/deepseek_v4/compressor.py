"""Gated pooling of token rows into compressed entries (main latents and indexer keys)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import PreparedWeight, compress, compressor_rows, prepare_weight

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config


class Compressor:
    """One compressor: projections to (u, g), pooling, norm, RoPE and rounding of the pooled entry.

    Args:
        config: the model's shape.
        weights: where ``<prefix>.wkv.weight`` etc. are taken from.
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
        self.wkv: PreparedWeight = prepare_weight(weights.block(f"{prefix}.wkv.weight"))
        self.wgate: PreparedWeight = prepare_weight(weights.block(f"{prefix}.wgate.weight"))
        self.ape = weights.tensor(f"{prefix}.ape")
        self.norm = weights.tensor(f"{prefix}.norm.weight")

    def rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """(u, g + ape) of each token: x [T, D] -> float32 [T, 2 * w] (float64 for float64 x)."""
        return compressor_rows(x, self.wkv, self.wgate, self.ape, positions)

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
