"""``compress_insert``: ``compress`` whose entries go straight into cache pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.index_query.api import check_index_dim
from kernels.kv_norm_rope.api import check_nope_blocks
from kernels.page_cache.api import check_pool
from kernels.page_layout import EntryKind, PageLayout
from kernels.rope.api import check_rope_inputs

_FLOATS = (torch.float32, torch.bfloat16)
_SLOTS = {4: 8, 128: 128}  # ratio -> rows an entry pools


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
    if ratio not in _SLOTS:
        raise KernelContractError(f"compress_insert: ratio {ratio}, allowed: 4, 128")
    if dtype not in _FLOATS:
        raise KernelContractError(f"compress_insert: dtype {dtype}, allowed: float32, bfloat16")
    count, head_dim, device = row_index.shape[0], layout.head_dim, rows.device
    width = 2 * head_dim * _SLOTS[ratio] // ratio
    check_tensor("compress_insert: rows", rows, shape=(None, width), dtype=torch.float32)
    check_tensor(
        "compress_insert: row_index",
        row_index,
        shape=(None, _SLOTS[ratio]),
        dtype=torch.int64,
        device=device,
    )
    check_tensor(
        "compress_insert: norm_weight",
        norm_weight,
        shape=(head_dim,),
        dtype=_FLOATS,
        device=device,
    )
    entries = rows.new_empty((count, head_dim))
    check_rope_inputs("compress_insert", entries, positions, inv_freq)
    index = layout.kind is EntryKind.INDEX
    if index:
        check_index_dim("compress_insert", head_dim, quantize)
    else:
        check_nope_blocks("compress_insert", head_dim, inv_freq, quantize)
    check_pool("compress_insert", pool, layout, device)
    check_tensor("compress_insert: slots", slots, shape=(count,), dtype=torch.int64, device=device)
    kernel("compress_insert", device)(
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
