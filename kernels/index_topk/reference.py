"""Torch twin of ``index_topk``: slices of rows through the twins of its two halves."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.index_score.reference import index_score
from kernels.numerics import widen
from kernels.page_layout import PageLayout
from kernels.topk.reference import topk_select

_MAX_SCORES = 1 << 24  # scores kept at once (64 MB)


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
    """See ``kernels.index_topk.api.index_topk``."""
    if head_scale is not None:
        w = widen(w.to(q.dtype)) * head_scale
    rows = q.shape[0]
    width = max(1, int(num_entries.max())) if rows else 1
    step = max(1, _MAX_SCORES // width)
    chosen = [torch.empty(0, k, dtype=torch.int32, device=q.device)]
    for first in range(0, rows, step):
        part = slice(first, first + step)
        scores = index_score(
            q[part], w[part], pool, layout, block_table, row_seq[part], num_entries[part]
        )
        chosen.append(topk_select(scores, k))
    return torch.cat(chosen)
