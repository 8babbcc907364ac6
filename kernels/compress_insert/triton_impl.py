"""``compress_insert`` on the GPU: the entry kernel with its page write switched on."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.compress.triton_impl import make_entries
from kernels.compress_insert import reference
from kernels.page_layout import EntryKind, PageLayout
from kernels.triton_math import twin_for_float64


@twin_for_float64(reference.compress_insert)
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
    make_entries(
        rows, row_index, norm_weight, positions, inv_freq, eps,
        ratio=ratio, index=layout.kind is EntryKind.INDEX, quantize=quantize, dtype=dtype,
        pages=(pool, layout, slots),
    )  # fmt: skip
