"""Torch twin of ``index_score``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.numerics import wide_dtype
from kernels.page_cache.reference import load_sequence, sequence_runs
from kernels.page_layout import PageLayout

_STRIDE = 256  # columns; the row stride is a multiple of it
_CHUNK = 1 << 22  # head scores handled at once (16 MB)
_COLUMNS = 4096  # entries scored at once
_ROWS = 256  # queries scored at once


def index_score(
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
) -> Tensor:
    """See ``kernels.index_score.api.index_score``."""
    tokens, heads, _ = q.shape
    wide = wide_dtype(q.dtype)
    width = max(0, int(num_entries.max())) if tokens else 0
    # Padded and poisoned on purpose: a consumer that takes the width for the row stride is seen at once.
    stride = (width // _STRIDE + 1) * _STRIDE
    buffer = torch.full((tokens, stride), float("inf"), dtype=wide, device=q.device)
    scores = buffer[:, :width].fill_(float("-inf"))
    for seq, start, stop in sequence_runs(row_seq):
        count = max(0, int(num_entries[start:stop].max())) if seq >= 0 else 0
        if count == 0:
            continue
        keys, present = load_sequence(pool, layout, block_table[seq], count, q.dtype)
        keys = keys.to(wide)
        for left in range(0, count, _COLUMNS):
            step = min(_ROWS, max(1, _CHUNK // (heads * min(_COLUMNS, count - left))))
            for first in range(start, stop, step):
                rows = slice(first, min(first + step, stop))
                # Causal: the first queries of a sequence see few of its entries.
                right = min(left + _COLUMNS, int(num_entries[rows].max()))
                if right <= left:
                    continue
                tile = _tile(q[rows], w[rows], keys[left:right])
                column = torch.arange(left, right, device=q.device)
                hidden = (column >= num_entries[rows, None]) | ~present[left:right]
                scores[rows, left:right] = tile.masked_fill_(hidden, float("-inf"))
    return scores


def _tile(q: Tensor, w: Tensor, keys: Tensor) -> Tensor:
    rows, heads, dim = q.shape
    # Packed copies: a matrix product may sum in another order when its input has another stride.
    dots = q.to(keys.dtype).contiguous().view(rows * heads, dim) @ keys.T
    weighted = torch.bmm(
        w.to(keys.dtype).contiguous()[:, None, :], dots.relu_().view(rows, heads, -1)
    )
    return weighted[:, 0]
