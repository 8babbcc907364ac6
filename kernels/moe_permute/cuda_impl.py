"""CUDA C++ for many choices: one launch finds all places, one copies. Few choices: Triton, one launch."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.moe_permute import triton_impl
from kernels.moe_permute.api import PermutedQuantRows, PermutedRows
from kernels.page_cache.cuda_pages import is_aligned
from kernels.quant_rows.api import QuantRows, empty_quant_rows

_FOLDER = Path(__file__).parent / "cuda"
_VECTOR = 16  # bytes that are copied at once
_MOST_EXPERTS, _MOST_CHOICES = 1024, 32  # local ones, whose counts lie in shared memory; of a token


class _Permute(ctypes.Structure):
    """``Permute`` of permute.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "weights", "offsets", "place")),
        *((name, ctypes.c_void_p) for name in ("row_weight", "rows", "scales")),
        *((name, ctypes.c_void_p) for name in ("rows_out", "scales_out")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "row_stride", "scale_stride")),
        *((name, ctypes.c_int64) for name in ("row_out_stride", "scale_out_stride")),
        *((name, ctypes.c_int64) for name in ("tokens", "first_expert")),
        *((name, ctypes.c_int) for name in ("choices", "local", "row_bytes", "scale_bytes")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(_FOLDER / "permute.cu")
    library.causeway_moe_permute.argtypes = (ctypes.POINTER(_Permute), ctypes.c_void_p)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def _takes(x: Tensor, ids: Tensor, weights: Tensor, num_local: int) -> bool:
    """Whether there are many choices with float32 weights, and rows copied 16 bytes at a time."""
    if weights.dtype != torch.float32 or weights.stride(-1) != 1:
        return False
    fits = num_local <= _MOST_EXPERTS and ids.shape[1] <= _MOST_CHOICES and is_aligned(x)
    fits = fits and x.stride(-1) == 1 and x.shape[1] * x.element_size() % _VECTOR == 0
    return fits and triton_impl.FEW < ids.numel() < 1 << 31


def _permute(
    x: Tensor,
    scale: Tensor | None,
    rows: Tensor,
    row_scale: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    first_expert: int,
    num_local: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``rows`` (and their scale bytes); returns offsets, row weights and places."""
    ids = ids.contiguous()
    device = x.device
    place = torch.empty(ids.shape, dtype=torch.int64, device=device)
    offsets = torch.empty((num_local + 1,), dtype=torch.int64, device=device)
    row_weight = torch.empty((ids.numel(),), dtype=torch.float32, device=device)
    call = _Permute(
        ids=ids.data_ptr(),
        weights=weights.data_ptr(),
        offsets=offsets.data_ptr(),
        place=place.data_ptr(),
        row_weight=row_weight.data_ptr(),
        rows=x.data_ptr(),
        rows_out=rows.data_ptr(),
        weight_stride=weights.stride(0),
        row_stride=x.stride(0) * x.element_size(),
        row_out_stride=rows.stride(0) * x.element_size(),
        tokens=ids.shape[0],
        first_expert=first_expert,
        choices=ids.shape[1],
        local=num_local,
        row_bytes=x.shape[1] * x.element_size(),
    )
    if scale is not None and row_scale is not None:
        call.scales, call.scales_out = scale.data_ptr(), row_scale.data_ptr()
        call.scale_stride, call.scale_out_stride = scale.stride(0), row_scale.stride(0)
        call.scale_bytes = scale.shape[1]
    code = _library().causeway_moe_permute(ctypes.byref(call), nvcc.stream(x))
    nvcc.check_launch("moe_permute", code)
    return offsets, row_weight, place


def moe_permute(
    x: Tensor, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedRows:
    """See ``kernels.moe_permute.api.moe_permute``."""
    if not _takes(x, ids, weights, num_local):
        return triton_impl.moe_permute(
            x, ids, weights, first_expert=first_expert, num_local=num_local
        )
    rows = torch.empty((ids.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    offsets, row_weight, place = _permute(
        x, None, rows, None, ids, weights, first_expert, num_local
    )
    return PermutedRows(rows=rows, offsets=offsets, row_weight=row_weight, place=place)


def moe_permute_quant(
    rows: QuantRows, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedQuantRows:
    """See ``kernels.moe_permute.api.moe_permute_quant``."""
    if not _takes(rows.q, ids, weights, num_local):
        return triton_impl.moe_permute_quant(
            rows, ids, weights, first_expert=first_expert, num_local=num_local
        )
    out = empty_quant_rows(ids.numel(), rows.shape[1], rows.device)
    offsets, row_weight, place = _permute(
        rows.q, rows.scale, out.q, out.scale, ids, weights, first_expert, num_local
    )
    return PermutedQuantRows(rows=out, offsets=offsets, row_weight=row_weight, place=place)
