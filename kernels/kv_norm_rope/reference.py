"""Torch twin of ``kv_norm_rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.page_layout import QUANT_BLOCK
from kernels.quant.reference import fake_quant_fp8
from kernels.rms_norm.reference import rms_norm
from kernels.rope.reference import apply_rope


def kv_norm_rope(
    kv: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, *, quantize: bool
) -> Tensor:
    """See ``kernels.kv_norm_rope.api.kv_norm_rope``."""
    rotated = apply_rope(rms_norm(kv, weight, eps), positions, inv_freq)
    return round_nope(rotated, 2 * inv_freq.numel()) if quantize else rotated


def round_nope(latent: Tensor, rope_dim: int) -> Tensor:
    """FQ8(64) on all but the last ``rope_dim`` dims of [T, d] latents."""
    nope = latent.shape[-1] - rope_dim
    if nope == 0:
        return latent
    return torch.cat((fake_quant_fp8(latent[..., :nope], QUANT_BLOCK), latent[..., nope:]), dim=-1)
