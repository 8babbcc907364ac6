"""``sparse_attention``: every query over its own window and its own compressed entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.page_cache.api import check_pool
from kernels.page_layout import EntryKind, PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRows:
    """Window keys as contiguous rows (prefill).

    Args:
        kv: [N, d] in the query's dtype.
        start: int64 [T], first row of each query's window.
        length: int64 [T], rows in it; 0 = none.
    """

    kv: Tensor
    start: Tensor
    length: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRing:
    """Window keys in a paged ring (decode).

    Args:
        pool: uint8 [P, layout.page_bytes].
        layout: page layout of ``pool``.
        slots: int64 [T, W], distinct within a row; -1 = none.
    """

    pool: Tensor
    layout: PageLayout
    slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPages:
    """Compressed entries in pages.

    Entry e of sequence s: page ``block_table[s, e // n]``, offset ``e % n``, n entries per page.

    Args:
        pool: uint8 [P, layout.page_bytes].
        layout: page layout of ``pool``.
        block_table: int32 [S, B]; -1 = page not here, its entries are skipped.
        row_seq: int64 [T], sequence of each query; -1 = none.
        index: int32 [T, K], entries to attend to, distinct within a row; -1 and entries
            >= ``num_entries`` are skipped. None = all entries below ``num_entries``.
        num_entries: int64 [T], entries a query may see.
    """

    pool: Tensor
    layout: PageLayout
    block_table: Tensor
    row_seq: Tensor
    index: Tensor | None
    num_entries: Tensor


def sparse_attention(
    q: Tensor,
    window: WindowRows | WindowRing | None,
    entries: EntryPages | None,
    *,
    sink: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``o = sum_e exp(z_e - m) c_e / (sum_e exp(z_e - m) + exp(sink - m))``, z = scale * <q, c>.

    Keys and values are the same latent rows c. Dots and sums are f32; for bfloat16 queries the
    rows are bfloat16 values and exp(z - m) is rounded to bfloat16 before it multiplies c (not in the
    denominator). m is the maximum over real keys: the sink is neither scaled nor part of it.

    Args:
        q: float32 or bfloat16 [T, H, d].
        window: window keys, or None.
        entries: compressed entries, or None.
        sink: float32 [H] logit per head without a value, or None.
        scale: logit scale.

    Returns:
        ``(o, lse)``: [T, H, d] in ``q.dtype``, and float32 [T, H] natural log-sum-exp of z without
        the sink. A row without any key: o = 0, lse = -inf, also with a sink.

    Raises:
        KernelContractError: wrong shape, dtype, device or layout; rows, slots, pages or entries
            outside their memory (checked on the CPU).
    """
    check_tensor(
        "sparse_attention: q", q, shape=(None, None, None), dtype=(torch.float32, torch.bfloat16)
    )
    if isinstance(window, WindowRows):
        check_tensor(
            "sparse_attention: window.kv",
            window.kv,
            shape=(None, q.shape[2]),
            dtype=q.dtype,
            beside=q,
        )
        _check_rows("window.start", window.start, q)
        _check_rows("window.length", window.length, q)
    elif window is not None:
        _check_latents("window", window.pool, window.layout, q)
        check_tensor(
            "sparse_attention: window.slots",
            window.slots,
            shape=(q.shape[0], None),
            dtype=torch.int64,
            beside=q,
        )
    if entries is not None:
        _check_entries(entries, q)
    if sink is not None:
        check_tensor(
            "sparse_attention: sink",
            sink,
            shape=(q.shape[1],),
            dtype=torch.float32,
            beside=q,
        )
    result: tuple[Tensor, Tensor] = kernel("sparse_attention", q.device)(
        q, window, entries, sink=sink, scale=scale
    )
    return result


def _check_entries(entries: EntryPages, q: Tensor) -> None:
    _check_latents("entries", entries.pool, entries.layout, q)
    check_tensor(
        "sparse_attention: entries.block_table",
        entries.block_table,
        shape=(None, None),
        dtype=torch.int32,
        beside=q,
    )
    _check_rows("entries.row_seq", entries.row_seq, q)
    _check_rows("entries.num_entries", entries.num_entries, q)
    if entries.index is not None:
        check_tensor(
            "sparse_attention: entries.index",
            entries.index,
            shape=(q.shape[0], None),
            dtype=torch.int32,
            beside=q,
        )


def _check_rows(name: str, tensor: Tensor, q: Tensor) -> None:
    check_tensor(
        f"sparse_attention: {name}",
        tensor,
        shape=(q.shape[0],),
        dtype=torch.int64,
        beside=q,
    )


def _check_latents(name: str, pool: Tensor, layout: PageLayout, q: Tensor) -> None:
    if layout.kind is not EntryKind.LATENT or layout.head_dim != q.shape[2]:
        raise KernelContractError(
            f"sparse_attention: {name}.layout holds {layout.kind.value} entries of"
            f" {layout.head_dim} values, expected latent entries of {q.shape[2]}"
        )
    check_pool(f"sparse_attention: {name}", pool, layout, q.device)
