"""``index_score``: how much each query wants each compressed entry."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.page_cache.api import check_pool
from kernels.page_layout import EntryKind, PageLayout


def index_score(
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
) -> Tensor:
    """``score[t, e] = sum_h relu(<q[t, h], k[e]>) * w[t, h]`` in f32, over paged index entries.

    Entry e of sequence s lies in page ``block_table[s, e // n]`` at offset ``e % n`` with
    n = ``layout.entries_per_page``.

    Args:
        q: float32 or bfloat16 [T, h, di].
        w: float32 [T, h], scales folded in; may be negative.
        pool: uint8 [P, layout.page_bytes] of index entries.
        layout: page layout of ``pool`` (kind INDEX, head_dim di).
        block_table: int32 [S, B]; -1 = page not here, its entries score -inf.
        row_seq: int64 [T], sequence of each row; -1 = none.
        num_entries: int64 [T], entries a row may see.

    Returns:
        float32 [T, max(num_entries)]; columns >= num_entries[t] are -inf. A view: ``stride(0)`` is a
        multiple of 256 above the width, and what lies between is poison (+inf).

    Raises:
        KernelContractError: wrong shape, dtype, device or layout; pages or entries outside the pool
            or the block table (checked on the CPU).
    """
    check_scored("index_score", q, w, pool, layout, block_table, row_seq, num_entries)
    result: Tensor = kernel("index_score", q.device)(
        q, w, pool, layout, block_table, row_seq, num_entries
    )
    return result


def check_scored(
    op: str,
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
) -> None:
    """Check what scores are made of.

    Raises:
        KernelContractError: see ``index_score``.
    """
    tokens, heads, dim = q.shape if q.dim() == 3 else (None, None, None)
    check_tensor(f"{op}: q", q, shape=(tokens, heads, dim), dtype=(torch.float32, torch.bfloat16))
    check_tensor(f"{op}: w", w, shape=(tokens, heads), dtype=torch.float32, beside=q)
    if layout.kind is not EntryKind.INDEX or layout.head_dim != dim:
        raise KernelContractError(
            f"{op}: layout holds {layout.kind.value} entries of {layout.head_dim} values,"
            f" expected index entries of {dim}"
        )
    check_pool(op, pool, layout, q.device)
    check_tensor(
        f"{op}: block_table",
        block_table,
        shape=(None, None),
        dtype=torch.int32,
        beside=q,
    )
    for name, per_row in (("row_seq", row_seq), ("num_entries", num_entries)):
        check_tensor(f"{op}: {name}", per_row, shape=(tokens,), dtype=torch.int64, beside=q)
