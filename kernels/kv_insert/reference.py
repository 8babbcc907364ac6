"""Torch twin of ``kv_insert``: the three ops one after the other."""

from __future__ import annotations

from torch import Tensor

from kernels.kv_norm_rope.reference import kv_norm_rope
from kernels.page_cache.reference import round_entries, store_entries
from kernels.page_layout import PageLayout


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
    latents = kv_norm_rope(kv, weight, positions, inv_freq, eps, quantize=quantize)
    store_entries(pool, layout, slots, latents)
    return round_entries(latents, layout)
