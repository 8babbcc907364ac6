"""``compress_insert`` in CUDA C++: the launch of ``compress`` with its page write switched on."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.compress.cuda_impl import build as build
from kernels.compress.cuda_impl import launch_entries
from kernels.compress_decode.cuda_impl import pools
from kernels.compress_insert import triton_impl
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
    index = layout.kind is EntryKind.INDEX
    if not pools(
        ratio=ratio,
        index=index,
        dim=layout.head_dim,
        inv_freq=inv_freq,
        dtypes={rows.dtype, dtype},
    ):
        triton_impl.compress_insert(
            rows, row_index, norm_weight, positions, inv_freq, eps, pool, layout, slots,
            ratio=ratio, quantize=quantize, dtype=dtype,
        )  # fmt: skip
        return
    launch_entries(
        rows, row_index, norm_weight, positions, inv_freq, eps,
        ratio=ratio, index=index, quantize=quantize, dtype=dtype, pages=(pool, layout, slots),
    )  # fmt: skip
