"""Torch twins of ``topk_select`` and ``topk_merge``."""

from __future__ import annotations

import torch
from torch import Tensor

_NEG_INF = float("-inf")
_CHUNK = 1 << 22  # scores handled at once, so temporaries stay near 50 MB


def topk_select(
    scores: Tensor, k: int, row_start: Tensor | None = None, row_end: Tensor | None = None
) -> Tensor:
    """See ``kernels.topk.api.topk_select``."""
    rows, columns = scores.shape
    out = torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    if rows == 0 or columns == 0 or k == 0:
        return out
    column = torch.arange(columns, device=scores.device)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values = scores[part]
        outside = torch.isnan(values)
        if row_start is not None:
            outside |= column < row_start[part, None]
        if row_end is not None:
            outside |= column >= row_end[part, None]
        chosen = _choose(values.masked_fill(outside, _NEG_INF), k)
        row, index = chosen.nonzero(as_tuple=True)
        rank = (chosen.cumsum(dim=1, dtype=torch.int32) - 1)[row, index].to(torch.int64)
        if row_start is not None:
            index = index - row_start[part][row]
        out[part][row, rank] = index.to(torch.int32)
    return out


def topk_merge(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """See ``kernels.topk.api.topk_merge``."""
    # In index order the tie rule of topk_select (smaller column) is the tie rule of the pairs.
    ordered, order = indices.sort(dim=1)
    candidates = values.gather(1, order).masked_fill(ordered < 0, _NEG_INF)
    column = topk_select(candidates, k)
    if ordered.shape[1] == 0:
        return column
    picked = ordered.gather(1, column.clamp(min=0).to(torch.int64))
    return picked.masked_fill(column < 0, -1)


def _choose(values: Tensor, k: int) -> Tensor:
    """Mask of the k best columns per row; rows hold no NaN, and -inf is never chosen."""
    candidate = values > _NEG_INF
    if k >= values.shape[1]:
        return candidate
    threshold = values.topk(k, dim=1, sorted=True).values[:, -1:]
    above = values > threshold
    tied = (values == threshold) & candidate
    room = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))
