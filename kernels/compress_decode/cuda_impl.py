"""CUDA C++: one launch; a cluster of blocks shares an entry of 128 rows."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.compress_decode import reference
from kernels.compress_decode.api import CompressPart
from kernels.page_cache.cuda_pages import PagesArg, aligned, is_aligned, pages_argument
from kernels.page_layout import PageLayout
from kernels.qkv_norm_rope.cuda_impl import (
    CLUSTER,
    INDEX_DIMS,
    LATENT_DIMS,
    LATENTS,
    PAIRS,
    ROW_MATH,
)

_FOLDER = Path(__file__).parent / "cuda"
POOLING = (_FOLDER / "pool128.cuh", _FOLDER / "pooling.cuh", ROW_MATH, CLUSTER, LATENTS)
_FLOATS = (torch.float32, torch.bfloat16)


class FinishArg(ctypes.Structure):
    """``Finish`` of pooling.cuh: what is done to pooled entries."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "inv_freq", "out")),
        ("pages", PagesArg),
        ("eps", ctypes.c_float),
        ("index_scale", ctypes.c_float),
        ("weight_f32", ctypes.c_int),
        ("quantize", ctypes.c_int),
    ]


class _Part(ctypes.Structure):
    _fields_ = [
        ("ape", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("column", ctypes.c_int64),
        ("finish", FinishArg),
        ("index", ctypes.c_int),
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "state", "positions", "seq", "base")),
        *((name, ctypes.c_int64) for name in ("row_stride", "state_stride", "tokens")),
        ("ring", ctypes.c_int),
        ("parts", _Part * 2),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(_FOLDER / "decode.cu", *POOLING)
    library.causeway_compress_decode.argtypes = (
        ctypes.POINTER(_Decode),
        *(ctypes.c_int,) * 5,
        ctypes.c_void_p,
    )
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def pools(*, ratio: int, index: bool, dim: int, inv_freq: Tensor, dtypes: set[torch.dtype]) -> bool:
    """Whether the kernels pool entries like these; ``dtypes`` of the rows and of the entries."""
    dims = INDEX_DIMS if index else LATENT_DIMS
    narrow = ratio == 4 or not index
    return narrow and dim in dims and inv_freq.numel() == PAIRS and dtypes <= set(_FLOATS)


def finish_argument(
    norm_weight: Tensor,
    inv_freq: Tensor,
    eps: float,
    *,
    quantize: bool,
    pages: tuple[Tensor, PageLayout] | None = None,
    out: Tensor | None = None,
) -> FinishArg:
    """The end of entries; ``norm_weight`` starts at a multiple of 16 bytes."""
    return FinishArg(
        weight=norm_weight.data_ptr(),
        inv_freq=inv_freq.data_ptr(),
        out=None if out is None else out.data_ptr(),
        pages=PagesArg() if pages is None else pages_argument(*pages),
        eps=eps,
        index_scale=float(norm_weight.shape[0]) ** -0.5,
        weight_f32=norm_weight.dtype is torch.float32,
        quantize=quantize,
    )


def compress_decode(
    rows: Tensor,
    state: Tensor,
    parts: tuple[CompressPart, ...],
    positions: Tensor,
    seq: Tensor,
    state_base: Tensor,
    *,
    ratio: int,
    ring_rows: int,
    inv_freq: Tensor,
    eps: float,
    quantize: bool,
    dtype: torch.dtype,
) -> None:
    """See ``kernels.compress_decode.api.compress_decode``."""
    dims = {part.index: part.layout.head_dim for part in parts}
    fits = len(dims) == len(parts) and is_aligned(state) and rows.dtype is torch.float32
    for index, dim in dims.items():
        fits = fits and pools(ratio=ratio, index=index, dim=dim, inv_freq=inv_freq, dtypes={dtype})
    if not fits or False not in dims:
        reference.compress_decode(
            rows,
            state,
            parts,
            positions,
            seq,
            state_base,
            ratio=ratio,
            ring_rows=ring_rows,
            inv_freq=inv_freq,
            eps=eps,
            quantize=quantize,
            dtype=dtype,
        )
        return
    rows = aligned(rows)
    call = _Decode(
        rows=rows.data_ptr(),
        state=state.data_ptr(),
        positions=positions.data_ptr(),
        seq=seq.data_ptr(),
        base=state_base.data_ptr(),
        row_stride=rows.stride(0),
        state_stride=state.stride(0),
        tokens=rows.shape[0],
        ring=ring_rows,
    )
    column, held = 0, []
    for place, part in enumerate(parts):
        ape, weight = aligned(part.ape.contiguous()), aligned(part.norm_weight)
        held += [ape, weight]  # copies live until the launch
        call.parts[place] = _Part(
            ape=ape.data_ptr(),
            slots=part.slots.data_ptr(),
            column=column,
            finish=finish_argument(
                weight, inv_freq, eps, quantize=quantize, pages=(part.pool, part.layout)
            ),
            index=part.index,
        )
        column += part.width
    code = _library().causeway_compress_decode(
        ctypes.byref(call),
        len(parts),
        ratio,
        dims[False],
        dims.get(True, INDEX_DIMS[-1]),
        dtype is torch.float32,
        nvcc.stream(rows),
    )
    nvcc.check_launch("compress_decode", code)
