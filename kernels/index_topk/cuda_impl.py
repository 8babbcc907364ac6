"""``index_topk`` on the GPU: score kernel and selection kernel over slices of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.index_score import cuda_impl as score
from kernels.index_topk import reference
from kernels.page_layout import PageLayout
from kernels.topk import cuda_impl as topk

_SCORE_BYTES = 1 << 30  # scores kept at once
_STRIDE = 256


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    score.build()
    topk.build()


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
    """See ``kernels.index_topk.api.index_topk``. Shapes the score kernel lacks run the torch twin."""
    if not score.supports(q, layout):
        return reference.index_topk(
            q, w, pool, layout, block_table, row_seq, num_entries, k, head_scale=head_scale
        )
    rows, width = q.shape[0], block_table.shape[1] * layout.entries_per_page
    chosen = torch.empty(rows, k, dtype=torch.int32, device=q.device)
    if width == 0:
        return chosen.fill_(-1)
    stride = -(-width // _STRIDE) * _STRIDE
    step = max(1, min(rows, _SCORE_BYTES // (4 * stride)))
    scores = torch.empty(step, stride, dtype=torch.float32, device=q.device)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        out = scores[: part.stop - first, :width]
        score.score_into(
            out,
            q[part],
            w[part],
            pool,
            layout,
            block_table,
            row_seq[part],
            num_entries[part],
            fill=False,
            head_scale=head_scale,
        )
        topk.select_into(chosen[part], out, None, num_entries[part], row_seq[part])
    return chosen
