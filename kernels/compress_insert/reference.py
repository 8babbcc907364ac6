"""Torch twin of ``compress_insert``: the two ops one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.compress.reference import compress
from kernels.page_cache.reference import store_entries
from kernels.page_layout import EntryKind, PageLayout


def compress_insert(
    rows: Tensor,
    row_index: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    ratio: int,
    quantize: bool,
    dtype: torch.dtype,
) -> None:
    """See ``kernels.compress_insert.api.compress_insert``."""
    entries = compress(
        rows,
        row_index,
        norm_weight,
        positions,
        inv_freq,
        eps,
        ratio=ratio,
        index=layout.kind is EntryKind.INDEX,
        quantize=quantize,
        dtype=dtype,
    )
    store_entries(pool, layout, slots, entries)
