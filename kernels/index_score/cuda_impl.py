"""``index_score`` on fp8 tensor cores: bfloat16 queries, 64 heads of 128 values, fp8 pages.

Other shapes and dtypes run the torch twin.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.index_score import reference
from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.page_layout import CacheDtype, PageLayout

_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = tuple(_FOLDER / name for name in ("index_score.cu", "keys.cuh", "product.cuh"))
_HEADS, _DIM = 64, 128
_STRIDE = 256  # columns; the row stride is a multiple of it
_DECODE_ROWS = 512  # up to here a block takes one row where most sequences have one or two
_SMALL_ROWS = 256  # up to here a block takes 4 rows, then 8
_TILE_ENTRIES = {1: 192, 4: 192, 8: 256}  # entries that a block takes at once, by its rows
_START_ENTRIES = {1: 256, 4: 256, 8: 600}  # what starting a block costs, in entries
_LEAST_START = 0.02  # at least, as a share: rows may end before the table


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    load_library(*_SOURCES)


def supports(q: Tensor, layout: PageLayout) -> bool:
    """Whether the kernel serves this shape and dtype."""
    return (
        q.dtype is torch.bfloat16
        and tuple(q.shape[1:]) == (_HEADS, _DIM)
        and layout.dtype is CacheDtype.FP8
    )


def index_score(
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
) -> Tensor:
    """See ``kernels.index_score.api.index_score``. Reads the width back: one host synchronisation."""
    if not supports(q, layout):
        return reference.index_score(q, w, pool, layout, block_table, row_seq, num_entries)
    rows = q.shape[0]
    width = max(0, int(num_entries.max())) if rows else 0
    stride = (width // _STRIDE + 1) * _STRIDE
    buffer = torch.empty(rows, stride, dtype=torch.float32, device=q.device)
    buffer[:, width:].fill_(float("inf"))  # poison, see the contract
    scores = buffer[:, :width]
    score_into(scores, q, w, pool, layout, block_table, row_seq, num_entries, fill=True)
    return scores


def score_into(
    out: Tensor,
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
    *,
    fill: bool,
    head_scale: float | None = None,
) -> None:
    """Write the scores of all visible entries to ``out`` [T, width]; no host synchronisation.

    Args:
        out: float32 [T, width], any row stride.
        fill: write -inf to the columns a row does not see; else they stay as they are.
        head_scale: as in ``index_topk``.
    """
    rows, width = out.shape
    if rows == 0 or width == 0:
        return
    if q.data_ptr() % 16 or q.stride(0) % 8 or q.stride(1) % 8:
        q = q.contiguous()
    tile = _tile(rows, block_table.shape[0])
    code = load_library(*_SOURCES).causeway_index_score(
        pointer(q),
        ctypes.c_int64(q.stride(0)),
        ctypes.c_int64(q.stride(1)),
        pointer(w),
        ctypes.c_int64(w.stride(0)),
        pointer(pool),
        ctypes.c_int64(pool.stride(0)),
        ctypes.c_int(layout.entries_per_page),
        pointer(block_table),
        ctypes.c_int64(block_table.stride(0)),
        pointer(row_seq),
        pointer(num_entries),
        pointer(out),
        ctypes.c_int64(out.stride(0)),
        ctypes.c_int(rows),
        ctypes.c_int(width),
        ctypes.c_int(fill),
        ctypes.c_float(head_scale or 0.0),  # 0: weights as they are
        ctypes.c_int(tile),
        *map(ctypes.c_int, _cut(-(-rows // tile), tile, width, q.device.index or 0)),
        stream(q),
    )
    check_launch("index_score", code)


def _tile(rows: int, sequences: int) -> int:
    """Rows of a block: they share the keys they read. The result is the same with any."""
    if rows <= min(2 * sequences, _DECODE_ROWS):
        return 1
    return 4 if rows <= _SMALL_ROWS else 8


@functools.lru_cache(maxsize=1024)
def _cut(tiles: int, tile: int, width: int, device: int) -> tuple[int, int]:
    """How blocks share the entries of tiles: (``coarse``, ``fine``).

    The first ``coarse`` tiles have a block each, the others are cut into ``fine`` blocks: whole rounds
    of the processors first, then what leaves few of them idle at the end.
    """
    at_once = _processors(device) * (2 if tile == 1 else 1)  # blocks that run at once
    most = max(1, min(at_once, -(-width // _TILE_ENTRIES[tile])))
    start = max(_START_ENTRIES[tile] / width, _LEAST_START)
    coarse = tiles // at_once * at_once

    def cost(parts: int) -> float:
        return -(-(tiles - coarse) * parts // at_once) * (1 / parts + start)

    return coarse, min(range(1, most + 1), key=cost)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
