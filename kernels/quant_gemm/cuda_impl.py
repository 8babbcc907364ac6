"""CUDA C++ implementation on Hopper's tensor cores: see cuda/gemm.cuh."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kernels import nvcc
from kernels.contract import KernelContractError
from kernels.grouped_gemm.api import PreparedExperts
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.linear.api import PreparedWeight
from kernels.linear.device_weight import Fp8Weight
from kernels.quant_gemm import reference, tuning
from kernels.quant_rows.api import QuantRows, empty_quant_rows, swiglu_quant

_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = tuple(sorted(_FOLDER.glob("*.cu")) + sorted(_FOLDER.glob("*.*h")))
_BLOCK = 128
_ALIGN = 16  # bytes between rows that the copy engine asks for


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
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(*_SOURCES)
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.causeway_gemm.argtypes = (
        *(number, pointer, wide, pointer, wide, wide, wide),
        *(ctypes.POINTER(_Arguments), number, pointer),
    )
    library.causeway_expand_fp4.argtypes = (*[pointer] * 5, *[number] * 5, pointer)
    return library


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.quant_gemm.api.linear_quant``."""
    weight: object = w  # one of the classes that prepare_weight made
    if not isinstance(weight, Fp8Weight):
        return reference.linear_quant(rows, w, out_dtype=out_dtype)
    out = torch.empty(rows.shape[0], w.out_features, dtype=out_dtype, device=rows.device)
    if out.numel() == 0:
        return out
    if w.in_features == 0:
        return out.zero_()
    tile = tuning.choose(out.shape[0], out.shape[1], _multiprocessors(rows.device.index))
    multiply(tile, rows, weight, out)
    return out


def multiply(tile: tuning.Tile, rows: QuantRows, w: Fp8Weight, out: Tensor) -> None:
    """One weight, with the tile named; ``out`` has a row for each of ``rows``."""
    data = w.data
    if data.stride(0) % _ALIGN or data.data_ptr() % _ALIGN or w.col_offset % _ALIGN:
        # An odd slice: the copy engine starts at multiples of 16 bytes only.
        data, rows = _from_block_start(data, w.col_offset), _rows_from_block_start(rows)
    scale = w.scale.unsqueeze(0)
    _launch(tile, rows, data.unsqueeze(0), scale, out, None, row_offset=w.row_offset)


def multiply_grouped(
    tile: tuning.Tile, rows: QuantRows, data: Tensor, scale: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """``out[offsets[g] : offsets[g + 1]] = rows[same] data[g]^T`` for every group."""
    _launch(tile, rows, data, scale, out, offsets, row_offset=0)


def _launch(
    tile: tuning.Tile,
    rows: QuantRows,
    data: Tensor,
    scale: Tensor,
    out: Tensor,
    offsets: Tensor | None,
    *,
    row_offset: int,
) -> None:
    if max(rows.scale.stride(0) * rows.shape[0], scale.stride(0) * scale.shape[0]) >= 1 << 32:
        raise KernelContractError(
            f"linear_quant: scale: expected less than 4 GiB, got rows {list(rows.scale.shape)} and"
            f" weights {list(scale.shape)}"
        )
    arguments = _Arguments(
        rows.scale.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        None if offsets is None else offsets.data_ptr(),
        rows.scale.stride(0),
        scale.stride(1),
        scale.stride(0),
        rows.shape[0],
        data.shape[0],
        data.shape[1],
        scale.shape[1],
        scale.shape[2],
        row_offset,
        rows.col_offset,
        out.dtype == torch.float32,
    )
    code = _library().causeway_gemm(
        tile.index,
        rows.q.data_ptr(),
        rows.q.stride(0),
        data.data_ptr(),
        data.stride(1),
        data.stride(0),
        data.shape[2],
        ctypes.byref(arguments),
        _multiprocessors(out.device.index),
        nvcc.stream(out),
    )
    nvcc.check_launch("linear_quant" if offsets is None else "expert_ffn_quant", code)


def expert_ffn_quant(
    rows: QuantRows,
    offsets: Tensor,
    row_weight: Tensor,
    experts: PreparedExperts,
    *,
    limit: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See ``kernels.quant_gemm.api.expert_ffn_quant``."""
    if not isinstance(experts, Fp8Experts | Fp4Experts):
        return reference.expert_ffn_quant(
            rows, offsets, row_weight, experts, limit=limit, out_dtype=out_dtype
        )
    count = rows.shape[0]
    out = torch.empty(count, experts.hidden_size, dtype=out_dtype, device=rows.device)
    if out.numel() == 0:
        return out
    tile = tuning.choose_grouped(count, experts.num_experts)
    width, second = experts.intermediate_size, experts.up_row
    hidden = torch.empty(count, experts.w13.shape[1], dtype=out_dtype, device=rows.device)
    w13 = experts.w13
    if isinstance(experts, Fp4Experts):
        w13 = expand_fp4(w13, experts.w13_sub, experts.w13_scale, offsets)
    multiply_grouped(tile, rows, w13, experts.w13_scale, offsets, hidden)
    gate, up = hidden[:, :width], hidden[:, second : second + width]
    inner = swiglu_quant(gate, up, limit=limit, row_weight=row_weight)
    w2 = experts.w2_data
    if isinstance(experts, Fp4Experts):
        w2 = expand_fp4(w2, experts.w2_sub, experts.w2_scale, offsets)
    multiply_grouped(tile, inner, w2, experts.w2_scale, offsets, out)
    return out


def expand_fp4(packed: Tensor, sub: Tensor, scale: Tensor, offsets: Tensor | None) -> Tensor:
    """FP4 weights [G, n, k / 2] as e4m3 [G, n, k] under the 128x128 scales ``scale``.

    Groups without rows in ``offsets`` stay unwritten.
    """
    groups, n, half = packed.shape
    out = torch.empty(groups, n, 2 * half, dtype=torch.float8_e4m3fn, device=packed.device)
    code = _library().causeway_expand_fp4(
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


def _from_block_start(data: Tensor, lead: int) -> Tensor:
    """A copy of e4m3 rows that begins ``lead`` zero columns earlier, rows at multiples of 16."""
    copy = empty_quant_rows(data.shape[0], lead + data.shape[1], data.device).q
    copy.view(torch.uint8)[:, :lead] = 0
    copy[:, lead:] = data
    return copy


def _rows_from_block_start(rows: QuantRows) -> QuantRows:
    q = _from_block_start(rows.q, rows.col_offset)
    return QuantRows(q=q, scale=rows.scale, col_offset=0)
