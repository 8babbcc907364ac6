"""``kv_insert`` on the GPU: the latent kernel with its page write switched on."""

from __future__ import annotations

from torch import Tensor

from kernels.kv_insert import reference
from kernels.kv_norm_rope.triton_impl import latent_rows
from kernels.page_layout import PageLayout
from kernels.triton_math import twin_for_float64


@twin_for_float64(reference.kv_insert)
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
    pages = (pool, layout, slots)
    return latent_rows(kv, weight, positions, inv_freq, eps, quantize=quantize, pages=pages)
