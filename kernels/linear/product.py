"""bf16 products on Hopper's tensor cores: what the libraries built from ``cuda/dense.cuh`` are told.

``product`` is the plain one; ``kernels.grouped_output`` starts its own library with the same
arguments. The order of summation depends on K alone, see cuda/dense.cuh.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels import nvcc
from kernels.linear import tuning

_KERNELS = Path(__file__).parents[1]
_FOLDER = Path(__file__).parent / "cuda"
# Headers of other ops that cuda/*.cuh include.
HEADERS = (
    *sorted(_FOLDER.glob("*.*h")),
    _KERNELS / "quant_rows" / "cuda" / "codes.cuh",
    _KERNELS / "quant_rows" / "cuda" / "scale_columns.cuh",
)
_SOURCES = (*sorted(_FOLDER.glob("*.cu")), *HEADERS)
_ALIGN = 8  # columns; rows start at multiples of 16 bytes for the copy engine
_STEP = 64  # columns of K in a stage
_SEGMENTS, _LEAST_STEPS = 4, 3  # cuda/dense_tiles.cuh
OUT_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}


class Arguments(ctypes.Structure):
    """``DenseArguments`` of cuda/dense.h, field by field."""

    _fields_: ClassVar = [
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scale_stride", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("column_blocks", ctypes.c_int),
        ("column_shift", ctypes.c_int),
        ("positions", ctypes.c_void_p),
        ("inv_freq", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("box_rows", ctypes.c_int),  # chosen with the tile
        ("n", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("k_steps", ctypes.c_int),
        ("segment_steps", ctypes.c_int),
        ("head_steps", ctypes.c_int),
        ("out_kind", ctypes.c_int),
        ("weight_early", ctypes.c_int),
    ]


def declare(function: Any) -> None:
    """Argument types of an entry of the form of ``causeway_product``."""
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function.argtypes = (
        *(number, pointer, wide, wide, pointer, wide, wide),
        *(ctypes.POINTER(Arguments), number, pointer),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(*_SOURCES)
    declare(library.causeway_product)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def k_steps(columns: int, least: int = _LEAST_STEPS) -> tuple[int, int]:
    """Steps of a product over ``columns``, and those of one segment: ``least`` or more."""
    steps = max(least, -(-columns // _STEP))
    return steps, max(least, -(-steps // _SEGMENTS))


def aligned(rows: Tensor) -> Tensor:
    """bf16 rows [m, k] as the copy engine reads them; a copy where they do not lie like that."""
    m, k = rows.shape
    if rows.data_ptr() % 16 == 0 and (m == 1 or _row_stride(rows) % _ALIGN == 0):
        return rows
    padded = torch.empty(m, -(-k // _ALIGN) * _ALIGN, dtype=rows.dtype, device=rows.device)[:, :k]
    return padded.copy_(rows)


def _row_stride(rows: Tensor) -> int:
    """Elements between rows; 1, which is never aligned, for rows that overlap."""
    return rows.stride(0) if rows.stride(0) >= rows.shape[1] else 1


def stride_bytes(stride: int, size: int, columns: int) -> int:
    """A stride in bytes; what a contiguous tensor would have where there is nothing to step over."""
    return 2 * (stride if size > 1 else -(-columns // _ALIGN) * _ALIGN)


def product(
    x: Tensor,
    w: Tensor,
    out_dtype: torch.dtype,
    *,
    early: bool = True,
    tile: int | None = None,
) -> Tensor:
    """``x w^T``, every row alone.

    Args:
        x: bf16 [m, k], any row stride.
        w: bf16 [n, k], any row stride.
        out_dtype: float32 or bfloat16.
        early: ``w`` was not written by the kernel directly ahead in the stream.
        tile: an index of ``tuning.TILES`` instead of the best one. All give the same bits.
    """
    (m, k), n = x.shape, w.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return out.zero_()
    left, right = aligned(x), aligned(w)
    steps, segment = k_steps(k)
    processors = tuning.multiprocessors(x.device.index)
    arguments = Arguments(
        out=out.data_ptr(),
        out_stride=n,
        rows=m,
        n=n,
        groups=1,
        k_steps=steps,
        segment_steps=segment,
        head_steps=1,
        out_kind=OUT_KIND[out_dtype],
        weight_early=early and right is w,
    )
    start(
        "linear",
        _library().causeway_product,
        tuning.choose(m, n, k, processors) if tile is None else tile,
        left,
        0,
        right,
        arguments,
    )
    return out


def start(
    op: str,
    entry: Callable[..., int],
    tile: int,
    left: Tensor,
    group_stride: int,
    right: Tensor,
    arguments: Arguments,
) -> None:
    """Start one product; ``group_stride`` is in elements, ``left`` the rows of the first group."""
    (m, k), groups = left.shape, arguments.groups
    row = stride_bytes(left.stride(0), m, k)
    code = entry(
        tile,
        left.data_ptr(),
        row,
        stride_bytes(group_stride, groups, k),
        right.data_ptr(),
        stride_bytes(right.stride(0), right.shape[0], k),
        k,
        ctypes.byref(arguments),
        tuning.multiprocessors(left.device.index),
        nvcc.stream(left),
    )
    nvcc.check_launch(op, code)
