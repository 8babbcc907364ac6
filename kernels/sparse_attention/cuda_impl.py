"""``sparse_attention`` on bf16 tensor cores: bfloat16 queries and latents of 448 + 64 values.

Window rows (prefill) and rings or none (decode) have a kernel each. float32 and float64 queries and
other head sizes run the torch twin.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.page_layout import CacheDtype, PageLayout
from kernels.sparse_attention import reference
from kernels.sparse_attention.api import EntryPages, WindowRing, WindowRows

_FOLDER = Path(__file__).parent / "cuda"
_PREFILL = tuple(
    _FOLDER / name
    for name in (
        "prefill.cu",
        "pages.cuh",
        "prefill_load.cuh",
        "prefill_scores.cuh",
        "prefill_tile.cuh",
        "prefill_values.cuh",
        "products.cuh",
        "query_map.h",
    )
)
_DECODE = tuple(
    _FOLDER / name
    for name in (
        "decode.cu",
        "decode_merge.cuh",
        "decode_narrow.cuh",
        "decode_plan.cuh",
        "decode_read.cuh",
        "decode_wide.cuh",
        "pages.cuh",
        "products.cuh",
        "query_map.h",
    )
)
_DIM, _ROPE = 512, 64
_HEAD_TILE = 64
_CHUNK = 160  # keys; as in decode_plan.cuh
_FEW_HEADS, _NARROW_CHUNK = 16, 80  # so many heads have a kernel of their own
_PARTIAL_BYTES = 1 << 29  # partial results of chunks kept at once
_FORMATS = {CacheDtype.FP8: 0, CacheDtype.BF16: 1, CacheDtype.FP32: 2}


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    load_library(*_PREFILL)
    load_library(*_DECODE)


def supports(q: Tensor, *layouts: PageLayout) -> bool:
    """Whether the kernels serve this shape and dtype."""
    return (
        q.dtype is torch.bfloat16
        and q.shape[2] == _DIM
        and all(x.rope_dim == _ROPE and x.dtype in _FORMATS for x in layouts)
    )


def sparse_attention(
    q: Tensor,
    window: WindowRows | WindowRing | None,
    entries: EntryPages | None,
    *,
    sink: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.sparse_attention.api.sparse_attention``."""
    layouts = [x.layout for x in (window, entries) if isinstance(x, WindowRing | EntryPages)]
    if not supports(q, *layouts) or not scale > 0:
        return reference.sparse_attention(q, window, entries, sink=sink, scale=scale)
    rows, heads, dim = q.shape
    o = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    if rows * heads == 0:
        return o, lse
    q = _aligned(q)
    if entries is not None and (entries.block_table.numel() == 0 or entries.pool.shape[0] == 0):
        entries = None  # no page at all
    if isinstance(window, WindowRows):
        _prefill(q, window, entries, sink, scale, o, lse)
    else:
        _decode(q, window, entries, sink, scale, o, lse)
    return o, lse


def _prefill(
    q: Tensor,
    window: WindowRows,
    entries: EntryPages | None,
    sink: Tensor | None,
    scale: float,
    o: Tensor,
    lse: Tensor,
) -> None:
    library = load_library(*_PREFILL)
    kv = _aligned(window.kv)
    decoded, capacity, seqs = None, 0, 0
    if entries is not None:
        seqs, blocks = entries.block_table.shape
        capacity = blocks * entries.layout.entries_per_page
        decoded = torch.empty(seqs * capacity, _DIM, dtype=torch.bfloat16, device=q.device)
        code = library.causeway_decode_pages(
            *_pages(entries.pool, entries.layout),
            pointer(entries.block_table),
            ctypes.c_int64(entries.block_table.stride(0)),
            ctypes.c_int64(seqs),
            ctypes.c_int(blocks),
            pointer(decoded),
            stream(q),
        )
        check_launch("sparse_attention: decode_pages", code)
    code = library.causeway_attend_prefill(
        *_queries(q),
        pointer(kv),
        ctypes.c_int64(kv.stride(0)),
        ctypes.c_int64(kv.shape[0]),
        pointer(window.start),
        pointer(window.length),
        pointer(None if entries is None else entries.pool),
        ctypes.c_int(1 if entries is None else entries.layout.entries_per_page),
        *_selection(entries),
        pointer(decoded),
        ctypes.c_int64(capacity),
        ctypes.c_int64(seqs),
        pointer(sink),
        ctypes.c_float(scale),
        pointer(o),
        pointer(lse),
        ctypes.c_int(q.shape[0]),
        ctypes.c_int(q.shape[1]),
        ctypes.c_int(_processors(q.device.index or 0)),
        stream(q),
    )
    check_launch("sparse_attention: prefill", code)


def _decode(
    q: Tensor,
    window: WindowRing | None,
    entries: EntryPages | None,
    sink: Tensor | None,
    scale: float,
    o: Tensor,
    lse: Tensor,
) -> None:
    library = load_library(*_DECODE)
    rows, heads, dim = q.shape
    keys = 0 if window is None else window.slots.shape[1]
    capacity = 0
    if entries is not None:
        capacity = entries.block_table.shape[1] * entries.layout.entries_per_page
        keys += capacity if entries.index is None else entries.index.shape[1]
    chunks = max(1, -(-keys // (_CHUNK if heads > _FEW_HEADS else _NARROW_CHUNK)))
    tiles, tile_heads = -(-heads // _HEAD_TILE), -(-min(heads, _HEAD_TILE) // 8) * 8
    step, partial, stats = rows, None, None
    if chunks > 1:
        row_bytes = tiles * chunks * tile_heads * dim * 2
        step = max(1, min(rows, _PARTIAL_BYTES // row_bytes))
        items = step * tiles * chunks
        partial = torch.empty(items, tile_heads, dim, dtype=torch.bfloat16, device=q.device)
        stats = torch.empty(items, tile_heads, 2, dtype=torch.float32, device=q.device)
    ring = () if window is None else _pages(window.pool, window.layout)
    pages = () if entries is None else _pages(entries.pool, entries.layout)
    no_pages = (pointer(None), ctypes.c_int64(0), ctypes.c_int(1), ctypes.c_int(0))
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        slots = None if window is None else window.slots[part]
        code = library.causeway_attend_decode(
            *_queries(q[part]),
            *(ring or no_pages),
            pointer(slots),
            ctypes.c_int64(0 if slots is None else slots.stride(0)),
            ctypes.c_int(0 if slots is None else slots.shape[1]),
            *(pages or no_pages),
            *_selection(entries, part),
            pointer(sink),
            ctypes.c_float(scale),
            pointer(o[part]),
            pointer(lse[part]),
            pointer(partial),
            pointer(stats),
            ctypes.c_int(part.stop - part.start),
            ctypes.c_int(heads),
            ctypes.c_int(chunks),
            ctypes.c_int(capacity),
            ctypes.c_int(_processors(q.device.index or 0)),
            stream(q),
        )
        check_launch("sparse_attention: decode", code)


def _aligned(rows: Tensor) -> Tensor:
    """The same values where every row starts at a multiple of 16 bytes of its own (dtype bfloat16)."""
    strides = rows.stride()[:-1]
    apart = rows.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
    return rows if apart else rows.contiguous()


def _queries(q: Tensor) -> tuple[Any, ...]:
    return pointer(q), ctypes.c_int64(q.stride(0)), ctypes.c_int64(q.stride(1))


def _pages(pool: Tensor, layout: PageLayout) -> tuple[Any, ...]:
    return (
        pointer(pool),
        ctypes.c_int64(pool.stride(0)),
        ctypes.c_int(layout.entries_per_page),
        ctypes.c_int(_FORMATS[layout.dtype]),
    )


def _selection(entries: EntryPages | None, rows: slice = slice(None)) -> tuple[Any, ...]:
    """Block table to ``num_entries``, as both launchers take them."""
    if entries is None:
        null = pointer(None)
        zero = ctypes.c_int64(0)
        return null, zero, null, null, zero, ctypes.c_int(0), null
    index = None if entries.index is None else entries.index[rows]
    return (
        pointer(entries.block_table),
        ctypes.c_int64(entries.block_table.stride(0)),
        pointer(entries.row_seq[rows]),
        pointer(index),
        ctypes.c_int64(0 if index is None else index.stride(0)),
        ctypes.c_int(0 if index is None else index.shape[1]),
        pointer(entries.num_entries[rows]),
    )


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
