"""Query norm and RoPE in CUDA C++: the kernel of ``qkv_norm_rope`` on query heads alone."""

from __future__ import annotations

from torch import Tensor

from kernels.q_norm_rope import triton_impl
from kernels.qkv_norm_rope.cuda_impl import LATENT_DIMS, launch_rows, takes
from kernels.qkv_norm_rope.cuda_impl import build as build


def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """See ``kernels.q_norm_rope.api.q_norm_rope``."""
    if takes(q, inv_freq, LATENT_DIMS):
        heads = launch_rows(positions, inv_freq, eps=eps, q=q)[0]
        if heads is not None:
            return heads
    return triton_impl.q_norm_rope(q, positions, inv_freq, eps)
