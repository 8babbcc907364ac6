"""Calls into the library of cuda/: one product, alone or with SwiGLU in its store, and FP4 expansion."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kernels import nvcc
from kernels.contract import KernelContractError
from kernels.quant_gemm import tuning
from kernels.quant_rows.api import QuantRows, columns_argument

_FOLDER = Path(__file__).parent / "cuda"
_ROWS_FOLDER = Path(__file__).parents[1] / "quant_rows" / "cuda"
_SOURCES = (
    *sorted(_FOLDER.glob("*.cu")),
    *sorted(_FOLDER.glob("*.*h")),
    *sorted(_ROWS_FOLDER.glob("*.cuh")),
)


class _Arguments(ctypes.Structure):
    """``GemmArguments`` of cuda/gemm.h, field by field."""

    _fields_: ClassVar = [
        ("a_scale", ctypes.c_void_p),
        ("b_scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("a_scale_stride", ctypes.c_uint32),
        ("b_scale_stride", ctypes.c_uint32),
        ("b_scale_group", ctypes.c_uint32),
        ("rows", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("n", ctypes.c_int),
        ("n_blocks", ctypes.c_int),
        ("k_blocks", ctypes.c_int),
        ("row_offset", ctypes.c_int),
        ("col_offset", ctypes.c_int),
        ("out_is_float", ctypes.c_int),
        ("out_is_mapped", ctypes.c_int),  # the library sets it
        ("offsets_are_old", ctypes.c_int),
    ]


class _GateArguments(ctypes.Structure):
    """``GateArguments`` of cuda/gemm.h, field by field."""

    _fields_: ClassVar = [
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scale_stride", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("column_blocks", ctypes.c_int),
        ("column_shift", ctypes.c_int),
        ("row_weight", ctypes.c_void_p),
        ("limit", ctypes.c_float),
        ("up_row", ctypes.c_int),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library."""
    loaded = nvcc.load_library(*_SOURCES)
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.causeway_gemm.argtypes = (
        *(number, pointer, wide, pointer, wide, wide, wide, wide),
        *(ctypes.POINTER(_Arguments), ctypes.POINTER(_GateArguments), number, pointer),
    )
    loaded.causeway_gemm_packed.argtypes = (
        *(number, pointer, wide, pointer, pointer, wide, wide),
        *(ctypes.POINTER(_Arguments), number, pointer),
    )
    loaded.causeway_expand_fp4.argtypes = (*[pointer] * 5, *[number] * 5, pointer)
    return loaded


@functools.cache
def multiprocessors(index: int) -> int:
    """Of the device with this index."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def product(
    tile: tuning.Tile,
    rows: QuantRows,
    data: Tensor,
    scale: Tensor,
    out: Tensor,
    offsets: Tensor | None,
    *,
    row_offset: int,
    offsets_are_old: bool = False,
) -> None:
    """``out = rows data^T``, the weights [G, n, k] found by ``offsets`` (None: there is one).

    ``offsets_are_old``: the kernel directly ahead in the stream writes neither them nor ``data``.
    """
    _launch(
        tile,
        rows,
        data,
        scale,
        offsets,
        _GateArguments(),
        out=out,
        row_offset=row_offset,
        offsets_are_old=offsets_are_old,
    )


def gated_product(
    tile: tuning.Tile,
    rows: QuantRows,
    data: Tensor,
    scale: Tensor,
    out: QuantRows,
    offsets: Tensor | None,
    *,
    up_row: int,
    row_weight: Tensor | None,
    limit: float,
) -> None:
    """The same with the gate's rows of ``data`` from 0, the up's from ``up_row`` on, and SwiGLU.

    ``out`` are the rows that ``swiglu_quant`` would make of the bfloat16 product.
    """
    weight = None if row_weight is None else row_weight.contiguous()
    columns, shift = columns_argument(out)
    gate = _GateArguments(
        out.q.data_ptr(),
        out.q.stride(0),
        out.scale.data_ptr(),
        out.scale.stride(0),
        columns,
        out.scale.shape[1],
        shift,
        None if weight is None else weight.data_ptr(),
        limit,
        up_row,
    )
    _launch(tile, rows, data, scale, offsets, gate, columns=out.shape[1])


def packed_product(
    tile: tuning.PackedTile,
    rows: QuantRows,
    packed: Tensor,
    sub: Tensor,
    scale: Tensor,
    out: Tensor,
    offsets: Tensor,
    *,
    offsets_are_old: bool = False,
) -> None:
    """``product`` of packed FP4 weights [G, n, k / 2] and their 1x32 scales, with the same bits.

    k is a multiple of ``tuning.PACKED_COLUMNS``, and the rows start at column 0.
    """
    arguments = _arguments(
        rows, scale, offsets, packed.shape[1], out=out, offsets_are_old=offsets_are_old
    )
    code = library().causeway_gemm_packed(
        tile.index,
        rows.q.data_ptr(),
        rows.q.stride(0),
        packed.data_ptr(),
        sub.data_ptr(),
        packed.shape[1],
        2 * packed.shape[2],
        ctypes.byref(arguments),
        multiprocessors(rows.device.index),
        nvcc.stream(rows.q),
    )
    nvcc.check_launch("expert_ffn_quant", code)


def _arguments(
    rows: QuantRows,
    scale: Tensor,
    offsets: Tensor | None,
    columns: int,
    *,
    out: Tensor | None,
    row_offset: int = 0,
    offsets_are_old: bool = False,
) -> _Arguments:
    if max(rows.scale.stride(0) * rows.shape[0], scale.stride(0) * scale.shape[0]) >= 1 << 32:
        raise KernelContractError(
            f"linear_quant: scale: expected less than 4 GiB, got rows {list(rows.scale.shape)} and"
            f" weights {list(scale.shape)}"
        )
    return _Arguments(
        rows.scale.data_ptr(),
        scale.data_ptr(),
        None if out is None else out.data_ptr(),
        0 if out is None else out.stride(0),
        None if offsets is None else offsets.data_ptr(),
        rows.scale.stride(0),
        scale.stride(1),
        scale.stride(0),
        rows.shape[0],
        scale.shape[0],
        columns,
        scale.shape[1],
        scale.shape[2],
        row_offset,
        rows.col_offset,
        out is not None and out.dtype == torch.float32,
        0,
        offsets_are_old,
    )


def _launch(
    tile: tuning.Tile,
    rows: QuantRows,
    data: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    gate: _GateArguments,
    *,
    out: Tensor | None = None,
    columns: int | None = None,
    row_offset: int = 0,
    offsets_are_old: bool = False,
) -> None:
    width = data.shape[1] if columns is None else columns
    arguments = _arguments(
        rows,
        scale,
        offsets,
        width,
        out=out,
        row_offset=row_offset,
        offsets_are_old=offsets_are_old,
    )
    code = library().causeway_gemm(
        tile.index,
        rows.q.data_ptr(),
        rows.q.stride(0),
        data.data_ptr(),
        data.stride(1),
        data.stride(0),
        data.shape[1],
        data.shape[2],
        ctypes.byref(arguments),
        ctypes.byref(gate),
        multiprocessors(rows.device.index),
        nvcc.stream(rows.q),
    )
    nvcc.check_launch("linear_quant" if offsets is None else "expert_ffn_quant", code)


def expand_fp4(packed: Tensor, sub: Tensor, scale: Tensor, offsets: Tensor | None) -> Tensor:
    """FP4 weights [G, n, k / 2], in device order, as e4m3 [G, n, k] under 128x128 scales ``scale``.

    Groups without rows in ``offsets`` stay unwritten.
    """
    groups, n, half = packed.shape
    out = torch.empty(groups, n, 2 * half, dtype=torch.float8_e4m3fn, device=packed.device)
    code = library().causeway_expand_fp4(
        packed.data_ptr(),
        sub.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        groups,
        n,
        2 * half,
        scale.shape[1],
        scale.shape[2],
        nvcc.stream(packed),
    )
    nvcc.check_launch("expert_ffn_quant", code)
    return out
