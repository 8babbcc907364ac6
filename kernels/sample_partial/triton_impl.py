"""Merge of the ranks' samples: one launch, ranks added in ascending order as in the twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64


@triton.jit(do_not_specialize=["count", "ranks"])
def _merge(score, ids, lse, out_ids, out_lse, count, ranks, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    # A row whose only scores are -inf keeps the first rank's id, as argmax does.
    best = tl.load(score + row, mask=inside, other=0.0)
    token = tl.load(ids + row, mask=inside, other=0)
    top = tl.load(lse + row, mask=inside, other=0.0)
    for rank in range(1, ranks):
        at = row + rank * count
        other = tl.load(score + at, mask=inside, other=0.0)
        token = tl.where(other > best, tl.load(ids + at, mask=inside, other=0), token)
        best = tl.maximum(best, other)
        top = tl.maximum(top, tl.load(lse + at, mask=inside, other=0.0))
    # No level to count from: an infinite part then stays infinite, a NaN stays NaN.
    level = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for rank in range(ranks):
        total += tl.exp(tl.load(lse + row + rank * count, mask=inside, other=0.0) - level)
    tl.store(out_ids + row, token, mask=inside)
    tl.store(out_lse + row, tl.log(total) + level, mask=inside)


def merge_samples(score: Tensor, ids: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.sample_partial.api.merge_samples``."""
    score, ids, lse = score.contiguous(), ids.contiguous(), lse.contiguous()
    ranks, count = score.shape
    out_ids, out_lse = torch.empty_like(ids[0]), torch.empty_like(lse[0])
    if count:
        _merge[(triton.cdiv(count, _ROWS),)](
            score, ids, lse, out_ids, out_lse, count, ranks, ROWS=_ROWS, num_warps=2
        )
    return out_ids, out_lse
