"""Entries in paged pools: ``store_entries``, ``load_entries``, ``round_entries``.

A slot is ``page * layout.entries_per_page + offset``; -1 means none. All byte arithmetic is
``PageLayout``'s. Pools may have any stride between pages (pages of several layers side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.page_layout import PageLayout

_ROW_DTYPES = (torch.float32, torch.bfloat16)
_LOAD_DTYPES = (*_ROW_DTYPES, torch.float64)


def store_entries(pool: Tensor, layout: PageLayout, slots: Tensor, rows: Tensor) -> None:
    """Encode ``rows`` by ``layout`` and write them at ``slots``; nothing else in the pool changes.

    fp8 latents: FP8 in blocks of 64 with scale 2^ceil(log2(max(amax, 1e-4) / 448)), rotary dims as
    bfloat16. fp8 index entries: one power-of-two scale 2^ceil(log2(amax / 448)). Latents already
    rounded by FQ8(64), and FP4-rounded vectors whose sub-scales spread at most 2^14, are stored
    without loss. float64 rows become float32 first.

    Args:
        pool: uint8 [P, layout.page_bytes].
        layout: page layout.
        slots: int64 [N], each distinct or -1 (row not stored).
        rows: float32 or bfloat16 [N, layout.head_dim].

    Raises:
        KernelContractError: wrong shape, dtype or device; a slot outside the pool (checked on the CPU).
    """
    check_pool("store_entries", pool, layout, rows.device)
    check_tensor("store_entries: rows", rows, shape=(None, layout.head_dim), dtype=_ROW_DTYPES)
    check_tensor(
        "store_entries: slots", slots, shape=(rows.shape[0],), dtype=torch.int64, beside=rows
    )
    kernel("store_entries", rows.device)(pool, layout, slots, rows)


def load_entries(pool: Tensor, layout: PageLayout, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Read and decode the entries at ``slots``.

    Args:
        pool: uint8 [P, layout.page_bytes].
        layout: page layout.
        slots: int64 [N]; -1 gives a row of zeros.
        dtype: float32, bfloat16 or float64.

    Returns:
        [N, layout.head_dim] in ``dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device; a slot outside the pool (checked on the CPU).
    """
    check_pool("load_entries", pool, layout, slots.device)
    check_tensor("load_entries: slots", slots, shape=(None,), dtype=torch.int64)
    if dtype not in _LOAD_DTYPES:
        raise KernelContractError(
            f"load_entries: dtype {dtype}, allowed: float32, bfloat16, float64"
        )
    result: Tensor = kernel("load_entries", slots.device)(pool, layout, slots, dtype)
    return result


def round_entries(rows: Tensor, layout: PageLayout) -> Tensor:
    """What ``load_entries`` gives back after ``store_entries``, without a pool.

    Args:
        rows: float32 or bfloat16 [N, layout.head_dim].
        layout: page layout.

    Returns:
        New rows in ``rows.dtype``.

    Raises:
        KernelContractError: wrong shape or dtype.
    """
    check_tensor("round_entries: rows", rows, shape=(None, layout.head_dim), dtype=_ROW_DTYPES)
    result: Tensor = kernel("round_entries", rows.device)(rows, layout)
    return result


def check_pool(op: str, pool: Tensor, layout: PageLayout, device: torch.device) -> None:
    """Check a pool against its layout.

    Raises:
        KernelContractError: not uint8, not [P, page_bytes], or a page stride that breaks alignment.
    """
    check_tensor(
        f"{op}: pool", pool, shape=(None, layout.page_bytes), dtype=torch.uint8, device=device
    )
    if pool.stride(0) % 4 or pool.storage_offset() % 4:
        raise KernelContractError(
            f"{op}: pool: page stride {pool.stride(0)} and offset {pool.storage_offset()} bytes"
            " must be multiples of 4"
        )
