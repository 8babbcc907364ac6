"""``merge_lse`` in CUDA C++ (float32 and bfloat16; float64 runs the torch twin)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.merge_lse import reference
from kernels.nvcc import check_launch, load_library, pointer, stream

_SOURCE = Path(__file__).parent / "cuda" / "merge_lse.cu"


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    load_library(_SOURCE)


def merge_lse(o: Tensor, lse: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels.merge_lse.api.merge_lse``."""
    if o.dtype not in (torch.bfloat16, torch.float32):
        return reference.merge_lse(o, lse, sink)
    parts, rows, heads, dim = o.shape
    merged = torch.empty(rows, heads, dim, dtype=o.dtype, device=o.device)
    merged_lse = torch.empty(rows, heads, dtype=torch.float32, device=o.device)
    if rows * heads == 0:
        return merged, merged_lse
    code = load_library(_SOURCE).causeway_merge_lse(
        pointer(o),
        ctypes.c_int(o.dtype is torch.bfloat16),
        *map(ctypes.c_int64, o.stride()[:3]),
        pointer(lse),
        *map(ctypes.c_int64, lse.stride()[:2]),
        pointer(sink),
        pointer(merged),
        pointer(merged_lse),
        ctypes.c_int(parts),
        ctypes.c_int64(rows),
        ctypes.c_int(heads),
        ctypes.c_int(dim),
        stream(o),
    )
    check_launch("merge_lse", code)
    return merged, merged_lse
