"""``kv_insert`` in CUDA C++: the kernel of ``qkv_norm_rope`` on latents alone."""

from __future__ import annotations

from torch import Tensor

from kernels.kv_insert import triton_impl
from kernels.page_layout import PageLayout
from kernels.qkv_norm_rope.cuda_impl import LATENT_DIMS, launch_rows, takes
from kernels.qkv_norm_rope.cuda_impl import build as build


def kv_insert(
    kv: Tensor,
    weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    quantize: bool,
) -> Tensor:
    """See ``kernels.kv_insert.api.kv_insert``."""
    if takes(kv, inv_freq, LATENT_DIMS):
        latents = launch_rows(
            positions,
            inv_freq,
            eps=eps,
            quantize=quantize,
            kv=kv,
            weight=weight,
            pages=(pool, layout, slots),
        )[1]
        if latents is not None:
            return latents
    return triton_impl.kv_insert(
        kv, weight, positions, inv_freq, eps, pool, layout, slots, quantize=quantize
    )
