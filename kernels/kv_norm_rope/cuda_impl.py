"""The KV latent in CUDA C++: the kernel of ``qkv_norm_rope`` on latents alone, without pages."""

from __future__ import annotations

from torch import Tensor

from kernels.kv_norm_rope import triton_impl
from kernels.qkv_norm_rope.cuda_impl import LATENT_DIMS, launch_rows, takes
from kernels.qkv_norm_rope.cuda_impl import build as build


def kv_norm_rope(
    kv: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, *, quantize: bool
) -> Tensor:
    """See ``kernels.kv_norm_rope.api.kv_norm_rope``."""
    if takes(kv, inv_freq, LATENT_DIMS):
        latents = launch_rows(
            positions, inv_freq, eps=eps, quantize=quantize, kv=kv, weight=weight
        )[1]
        if latents is not None:
            return latents
    return triton_impl.kv_norm_rope(kv, weight, positions, inv_freq, eps, quantize=quantize)
