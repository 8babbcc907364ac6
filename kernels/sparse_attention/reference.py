"""Torch twin of ``sparse_attention``, and what a CPU serves: dense products per chunk of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.numerics import wide_dtype, widen
from kernels.page_cache.reference import sequence_runs
from kernels.sparse_attention.api import EntryPages, WindowRing, WindowRows
from kernels.sparse_attention.keys import (
    GatheredEntryKeys,
    Keys,
    KeySource,
    RingKeys,
    SequenceEntryKeys,
    WindowRowKeys,
)

_NEG_INF = float("-inf")
_CHUNK = 1 << 22  # f32 values of the largest temporary of a chunk (16 MB)
_MAX_ROWS = 128  # queries per chunk: more would widen the shared window span for nothing
_ROWS_PER_SEQUENCE = 4  # fewer queries per sequence than this on average: gather across sequences


def sparse_attention(
    q: Tensor,
    window: WindowRows | WindowRing | None,
    entries: EntryPages | None,
    *,
    sink: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.sparse_attention.api.sparse_attention``."""
    tokens, heads, dim = q.shape
    o = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=wide_dtype(q.dtype), device=q.device)
    if tokens == 0:
        return o, lse
    shared: list[KeySource] = []
    if isinstance(window, WindowRows):
        shared.append(WindowRowKeys(window))
    elif window is not None:
        shared.append(RingKeys(window, q.dtype))
    for start, stop, source in _entry_sources(entries, q):
        sources = shared if source is None else [*shared, source]
        scores = heads * sum(s.width() for s in sources)
        gathered = sum(s.values_per_row() for s in sources)
        step = min(_MAX_ROWS, max(1, _CHUNK // max(1, scores, gathered, heads * dim)))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            keys = [s.keys(first, last) for s in sources]
            o[first:last], lse[first:last] = _attend(q[first:last], keys, sink, scale)
    return o, lse


def _entry_sources(
    entries: EntryPages | None, q: Tensor
) -> Iterator[tuple[int, int, KeySource | None]]:
    """Ranges of query rows and where each range reads its entries (decoded when its turn comes)."""
    tokens, heads, _ = q.shape
    if entries is None:
        yield 0, tokens, None
        return
    runs = sequence_runs(entries.row_seq)
    if tokens < _ROWS_PER_SEQUENCE * len(runs):
        yield 0, tokens, GatheredEntryKeys(entries, q.dtype)
        return
    for seq, start, stop in runs:
        if SequenceEntryKeys.fits(entries, start, stop):
            yield start, stop, SequenceEntryKeys(entries, q.dtype, heads, seq, start, stop)
        else:
            yield start, stop, GatheredEntryKeys(entries, q.dtype)


def _attend(
    q: Tensor, keys: list[Keys], sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o (not yet cast) and lse of a chunk of rows over all its key lists."""
    if all(bool(torch.isfinite(k.rows.sum())) for k in keys if k.shared):
        return _softmax_sum(q, keys, sink, scale)
    # Zero weight times NaN is NaN: keep rows that a query does not use away from it.
    parts = [
        _softmax_sum(q[row : row + 1], [k.select(row) for k in keys], sink, scale)
        for row in range(q.shape[0])
    ]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


def _softmax_sum(
    q: Tensor, keys: list[Keys], sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads, dim = q.shape
    # Packed copy: a matrix product may sum in another order when its input has another stride.
    wide = widen(q).contiguous()
    logits = [_scores(wide, k).mul_(scale).masked_fill_(~k.mask[:, None], _NEG_INF) for k in keys]
    top = torch.full((rows, heads), _NEG_INF, dtype=wide.dtype, device=q.device)
    for z in logits:
        if z.shape[-1]:
            top = torch.maximum(top, z.amax(dim=-1))
    empty = top == _NEG_INF
    top = top.masked_fill(empty, 0.0)
    total = torch.zeros_like(top)
    acc = torch.zeros(rows, heads, dim, dtype=wide.dtype, device=q.device)
    for z, k in zip(logits, keys, strict=True):
        p = z.sub_(top[..., None]).exp_()
        total += p.sum(dim=-1)
        if q.dtype is torch.bfloat16:
            p = p.to(torch.bfloat16).to(torch.float32)
        acc += _weighted(p, k)
    denominator = total if sink is None else total + (sink.to(wide.dtype) - top).exp()
    o = acc / denominator.masked_fill(empty, 1.0)[..., None]
    return o, (total.log() + top).masked_fill(empty, _NEG_INF)


def _scores(q: Tensor, keys: Keys) -> Tensor:
    rows, heads, dim = q.shape
    if keys.shared:
        return (q.view(rows * heads, dim) @ keys.rows.T).view(rows, heads, -1)
    return torch.bmm(q, keys.rows.transpose(1, 2))


def _weighted(p: Tensor, keys: Keys) -> Tensor:
    rows, heads, count = p.shape
    if keys.shared:
        return (p.view(rows * heads, count) @ keys.rows).view(rows, heads, -1)
    return torch.bmm(p, keys.rows)
