"""Torch twin of ``qkv_norm_rope``: the three ops one after the other."""

from __future__ import annotations

from torch import Tensor

from kernels.index_query.reference import index_query
from kernels.kv_insert.reference import kv_insert
from kernels.page_layout import PageLayout
from kernels.q_norm_rope.reference import q_norm_rope


def qkv_norm_rope(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    quantize: bool,
    index_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``kernels.qkv_norm_rope.api.qkv_norm_rope``."""
    heads = q_norm_rope(q, positions, inv_freq, eps)
    latents = kv_insert(
        kv, kv_weight, positions, inv_freq, eps, pool, layout, slots, quantize=quantize
    )
    if index_q is None:
        return heads, latents, None
    return heads, latents, index_query(index_q, positions, inv_freq, quantize=quantize)
