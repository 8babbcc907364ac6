"""``compress_insert``: ``compress`` whose entries go straight into cache pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.compress.api import check_entry_dims, check_pooled
from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.page_cache.api import check_pool
from kernels.page_layout import EntryKind, PageLayout

_FLOATS = (torch.float32, torch.bfloat16)


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
    """``store_entries(pool, layout, slots, compress(..))`` without the rows in between.

    Args:
        rows: float32 [N, 2 * w], as ``compress`` takes them.
        row_index: int64 [E, 8] (ratio 4) or [E, 128]; -1 = missing row. See ``compress``.
        norm_weight: [d], float32 or bfloat16.
        positions: int64 [E].
        inv_freq: float32 [r/2].
        eps: RMSNorm epsilon.
        pool: uint8 [P, layout.page_bytes].
        layout: entries of head_dim d; index entries make this the indexer's compressor.
        slots: int64 [E], each distinct or -1 (entry not stored).
        ratio: 4 or 128.
        quantize: apply the official rounding.
        dtype: compute dtype, float32 or bfloat16.

    Raises:
        KernelContractError: wrong shape, dtype, device, ratio or layout; on the CPU also a row or
            slot outside its tensor.
    """
    if dtype not in _FLOATS:
        raise KernelContractError(f"compress_insert: dtype {dtype}, allowed: float32, bfloat16")
    op, dim = "compress_insert", layout.head_dim
    check_pooled(op, rows, row_index, norm_weight, positions, inv_freq, ratio, dim)
    index = layout.kind is EntryKind.INDEX
    check_entry_dims(op, dim, inv_freq, index=index, quantize=quantize)
    check_pool(op, pool, layout, rows.device)
    count = row_index.shape[0]
    check_tensor(f"{op}: slots", slots, shape=(count,), dtype=torch.int64, beside=rows)
    kernel(op, rows.device)(
        rows,
        row_index,
        norm_weight,
        positions,
        inv_freq,
        eps,
        pool,
        layout,
        slots,
        ratio=ratio,
        quantize=quantize,
        dtype=dtype,
    )
