"""CUDA C++: pooling and all that follows it in one launch, to rows or into pages."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.compress import triton_impl
from kernels.compress_decode.cuda_impl import POOLING, FinishArg, finish_argument, pools
from kernels.page_cache.cuda_pages import aligned
from kernels.page_layout import PageLayout

_FOLDER = Path(__file__).parent / "cuda"


class _Chunk(ctypes.Structure):
    """``Chunk`` of compress.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "row_index", "positions", "slots")),
        *((name, ctypes.c_int64) for name in ("row_stride", "index_stride", "entries")),
        ("finish", FinishArg),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(_FOLDER / "compress.cu", *POOLING)
    library.causeway_compress.argtypes = (
        ctypes.POINTER(_Chunk),
        *(ctypes.c_int,) * 4,
        ctypes.c_void_p,
    )
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def launch_entries(
    rows: Tensor,
    row_index: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    *,
    ratio: int,
    index: bool,
    quantize: bool,
    dtype: torch.dtype,
    pages: tuple[Tensor, PageLayout, Tensor] | None,
) -> Tensor:
    """Entries [E, d]; with ``pages`` (pool, layout, slots) they are stored there and none come back."""
    count, dim = row_index.shape[0], norm_weight.shape[0]
    out = torch.empty((count if pages is None else 0, dim), dtype=dtype, device=rows.device)
    rows, norm_weight = aligned(rows), aligned(norm_weight)
    call = _Chunk(
        rows=rows.data_ptr(),
        row_index=row_index.data_ptr(),
        positions=positions.data_ptr(),
        slots=None if pages is None else pages[2].data_ptr(),
        row_stride=rows.stride(0),
        index_stride=row_index.stride(0),
        entries=count,
        finish=finish_argument(
            norm_weight,
            inv_freq,
            eps,
            quantize=quantize,
            pages=None if pages is None else pages[:2],
            out=out if pages is None else None,
        ),
    )
    code = _library().causeway_compress(
        ctypes.byref(call), ratio, dim, index, dtype is torch.float32, nvcc.stream(rows)
    )
    nvcc.check_launch("compress", code)
    return out


def compress(
    rows: Tensor,
    row_index: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    *,
    ratio: int,
    index: bool,
    quantize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See ``kernels.compress.api.compress``."""
    dim = norm_weight.shape[0]
    if not pools(ratio=ratio, index=index, dim=dim, inv_freq=inv_freq, dtypes={rows.dtype, dtype}):
        return triton_impl.compress(
            rows, row_index, norm_weight, positions, inv_freq, eps,
            ratio=ratio, index=index, quantize=quantize, dtype=dtype,
        )  # fmt: skip
    return launch_entries(
        rows, row_index, norm_weight, positions, inv_freq, eps,
        ratio=ratio, index=index, quantize=quantize, dtype=dtype, pages=None,
    )  # fmt: skip
