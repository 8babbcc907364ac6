"""Pages and rows as the CUDA C++ kernels take them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.page_layout import CacheDtype, EntryKind, PageLayout

_VECTOR = 16  # bytes that a kernel reads at once


class PagesArg(ctypes.Structure):
    """``Pages`` of qkv_norm_rope/cuda/row_math.cuh; zeros mean that nothing is stored."""

    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("format", ctypes.c_int),
        ("per_page", ctypes.c_int),
        ("payload", ctypes.c_int),
        ("scale_offset", ctypes.c_int),
        ("scale_bytes", ctypes.c_int),
    ]


def pages_argument(pool: Tensor, layout: PageLayout) -> PagesArg:
    """A pool and its layout; the formats are numbered as in ``triton_pages``."""
    if layout.dtype is CacheDtype.FP8:
        form = 2 if layout.kind is EntryKind.INDEX else 1
    else:
        form = 3 if layout.dtype is CacheDtype.BF16 else 4
    return PagesArg(
        pool=pool.data_ptr(),
        stride=pool.stride(0),
        format=form,
        per_page=layout.entries_per_page,
        payload=layout.payload_bytes,
        scale_offset=layout.scale_offset,
        scale_bytes=layout.scale_bytes,
    )


def is_aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    strides = (s * x.element_size() for s in x.stride()[:-1])
    return x.data_ptr() % _VECTOR == 0 and all(s % _VECTOR == 0 for s in strides)


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it whose rows start at multiples of 16 bytes."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
