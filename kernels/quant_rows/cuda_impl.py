"""CUDA C++ implementation: one pass over the rows, half a warp per 128 columns."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.quant_rows.api import QuantRows, columns_argument, empty_quant_rows
from kernels.rms_norm.api import rms_norm

_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = (_FOLDER / "quant_rows.cu", *sorted(_FOLDER.glob("*.cuh")))
_NORM_COLUMNS = 8192  # a row of more columns does not fit a thread block's registers


@functools.cache
def _library() -> ctypes.CDLL:
    pointer, number, wide, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    library = nvcc.load_library(*_SOURCES)
    # q, scale, their float32 form by columns, rows and columns
    codes = (pointer, wide, pointer, wide, pointer, number, wide, number)
    library.causeway_quant_rows.argtypes = (
        *(pointer, number, wide, pointer, wide),
        *codes,
        *(number, number, pointer),
    )
    library.causeway_swiglu_quant.argtypes = (
        *(pointer, pointer, number, wide, wide, pointer, real),
        *codes,
        *(number, pointer),
    )
    library.causeway_rms_norm_quant.argtypes = (
        *(pointer, number, wide, pointer, number, real, pointer, wide),
        *codes,
        pointer,
    )
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def quant_rows(x: Tensor, *, amax: Tensor | None = None, col_offset: int = 0) -> QuantRows:
    """See ``kernels.quant_rows.api.quant_rows``."""
    out = empty_quant_rows(x.shape[0], x.shape[1], x.device, col_offset=col_offset, for_pieces=True)
    if out.q.numel() == 0:
        return out
    code = _library().causeway_quant_rows(
        x.data_ptr(),
        x.dtype == torch.float32,
        x.stride(0),
        None if amax is None else amax.data_ptr(),
        0 if amax is None else amax.stride(0),
        *_codes(out),
        col_offset,
        col_offset == 0 and _wide(x),
        nvcc.stream(x),
    )
    nvcc.check_launch("quant_rows", code)
    return out


def swiglu_quant(
    g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None
) -> QuantRows:
    """See ``kernels.quant_rows.api.swiglu_quant``."""
    out = empty_quant_rows(g.shape[0], g.shape[1], g.device, for_pieces=True)
    if out.q.numel() == 0:
        return out
    weight = None if row_weight is None else row_weight.contiguous()
    code = _library().causeway_swiglu_quant(
        g.data_ptr(),
        u.data_ptr(),
        g.dtype == torch.float32,
        g.stride(0),
        u.stride(0),
        None if weight is None else weight.data_ptr(),
        limit,
        *_codes(out),
        _wide(g) and _wide(u),
        nvcc.stream(g),
    )
    nvcc.check_launch("swiglu_quant", code)
    return out


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, QuantRows]:
    """See ``kernels.quant_rows.api.rms_norm_quant``."""
    factors = weight.contiguous()
    if x.shape[1] % 8 == 0 and not _wide(x):
        x = x.clone(memory_format=torch.contiguous_format)  # one order of summation for all strides
    if x.shape[1] > _NORM_COLUMNS or not _wide(x) or factors.data_ptr() % 16:
        normed = rms_norm(x, weight, eps)
        return normed, quant_rows(normed)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = empty_quant_rows(x.shape[0], x.shape[1], x.device, for_pieces=True)
    if out.q.numel() == 0:
        return normed, out
    code = _library().causeway_rms_norm_quant(
        x.data_ptr(),
        x.dtype == torch.float32,
        x.stride(0),
        factors.data_ptr(),
        factors.dtype == torch.float32,
        eps,
        normed.data_ptr(),
        normed.stride(0),
        *_codes(out),
        nvcc.stream(x),
    )
    nvcc.check_launch("rms_norm_quant", code)
    return normed, out


def _codes(out: QuantRows) -> tuple[int | None, ...]:
    q, scale = out.q, out.scale
    lines = (q.data_ptr(), q.stride(0), scale.data_ptr(), scale.stride(0))
    return *lines, *columns_argument(out), *out.shape


def _wide(x: Tensor) -> bool:
    """Whether every eight columns from a multiple of eight on may be read at once."""
    return x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
