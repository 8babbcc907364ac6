"""``topk_select`` and ``topk_merge`` in CUDA C++ (float32; float64 runs the torch twin)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.topk import reference

_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = tuple(
    _FOLDER / name for name in ("topk.cu", "row.cuh", "held.cuh", "edge.cuh", "select.cuh")
)
_MERGE_COLUMNS = 8192  # candidates of a row that fit into shared memory
_LONG_ROW = 16384  # columns; a cluster of 8 blocks may read such a row,
_CLUSTER_ROWS = 16  # up to this many rows: a block for every processor
_SHORT_ROW = 2048  # columns that the registers of 256 threads hold; 512 hold 8192
_FEW_ROWS = 264  # blocks of 512 threads that run at once
_SMALL_K, _SMALL_ROW = 1024, 65536  # up to here few candidates are kept: more rows at once


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    load_library(*_SOURCES)


def topk_select(
    scores: Tensor, k: int, row_start: Tensor | None = None, row_end: Tensor | None = None
) -> Tensor:
    """See ``kernels.topk.api.topk_select``."""
    if scores.dtype is not torch.float32:
        return reference.topk_select(scores, k, row_start, row_end)
    out = torch.empty(scores.shape[0], k, dtype=torch.int32, device=scores.device)
    select_into(out, scores, row_start, row_end)
    return out


def select_into(
    out: Tensor,
    scores: Tensor,
    row_start: Tensor | None,
    row_end: Tensor | None,
    row_seq: Tensor | None = None,
) -> None:
    """``topk_select`` of float32 scores into ``out``, int32 [T, k] without gaps between rows.

    Args:
        row_seq: int64 [T]; a row below 0 has no candidate. None: every row counts.
    """
    (rows, columns), k = scores.shape, out.shape[1]
    if rows == 0 or k == 0:
        return
    code = load_library(*_SOURCES).causeway_topk_select(
        pointer(scores),
        ctypes.c_int64(rows),
        ctypes.c_int64(scores.stride(0)),
        ctypes.c_int(columns),
        ctypes.c_int(k),
        pointer(row_start),
        pointer(row_end),
        pointer(row_seq),
        pointer(out),
        ctypes.c_int(_shape(rows, columns, k)),
        stream(scores),
    )
    check_launch("topk_select", code)


def _shape(rows: int, columns: int, k: int) -> int:
    """How many threads take a row; see the launcher. The result is the same with any."""
    if rows <= _CLUSTER_ROWS and columns >= _LONG_ROW:
        return 2
    if columns <= _SHORT_ROW:
        return 0
    few = rows <= _FEW_ROWS or columns <= 4 * _SHORT_ROW
    return 1 if few or k > _SMALL_K or columns > _SMALL_ROW else 0


def topk_merge(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """See ``kernels.topk.api.topk_merge``. More than 8192 candidates run the torch twin."""
    rows, columns = values.shape
    if values.dtype is not torch.float32 or columns > _MERGE_COLUMNS:
        return reference.topk_merge(values, indices, k)
    out = torch.empty(rows, k, dtype=torch.int32, device=values.device)
    if rows == 0 or k == 0:
        return out
    code = load_library(*_SOURCES).causeway_topk_merge(
        pointer(values),
        ctypes.c_int64(values.stride(0)),
        pointer(indices),
        ctypes.c_int64(indices.stride(0)),
        ctypes.c_int64(rows),
        ctypes.c_int(columns),
        ctypes.c_int(k),
        pointer(out),
        stream(values),
    )
    check_launch("topk_merge", code)
    return out
