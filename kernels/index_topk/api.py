"""``index_topk``: the entries each query wants most, without handing out the scores."""

from __future__ import annotations

from torch import Tensor

from kernels.contract import KernelContractError
from kernels.dispatch import kernel
from kernels.index_score.api import check_scored
from kernels.page_layout import PageLayout


def index_topk(
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
    k: int,
    *,
    head_scale: float | None = None,
) -> Tensor:
    """``topk_select(index_score(...), k)``, where the GPU needs no host synchronisation.

    The scores stay inside, in slices of rows; their width is the block table's capacity, so nothing
    has to be read back. The result depends on each row alone.

    Args:
        q: float32 or bfloat16 [T, h, di].
        w: float32 [T, h].
        pool: uint8 [P, layout.page_bytes] of index entries.
        layout: page layout of ``pool`` (kind INDEX, head_dim di).
        block_table: int32 [S, B]; -1 = page not here, its entries are never chosen.
        row_seq: int64 [T], sequence of each row; -1 = none, nothing is chosen.
        num_entries: int64 [T], entries a row may see.
        k: any number >= 0.
        head_scale: not 0. ``w`` are products not rounded yet: each becomes ``q.dtype``, then is multiplied
            by this in float32. None: ``w`` as it is.

    Returns:
        int32 [T, k]: chosen entries, ascending, -1 last; ties go to the smaller entry.

    Raises:
        KernelContractError: wrong shape, dtype, device or layout; negative k; a ``head_scale`` of 0;
            pages or entries outside the pool or the block table (checked on the CPU).
    """
    check_scored("index_topk", q, w, pool, layout, block_table, row_seq, num_entries)
    if k < 0:
        raise KernelContractError(f"index_topk: k = {k}, allowed: 0 and above")
    if head_scale == 0:
        raise KernelContractError("index_topk: head_scale: expected a number other than 0, or None")
    result: Tensor = kernel("index_topk", q.device)(
        q, w, pool, layout, block_table, row_seq, num_entries, k, head_scale=head_scale
    )
    return result
