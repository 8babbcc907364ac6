"""CUDA C++: the row ops around attention, any of them in one launch.

``q_norm_rope``, ``kv_norm_rope``, ``kv_insert`` and ``index_query`` are launches of the same kernel with the
other rows left out, so a row has the same bits from all of them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.index_query import triton_impl as index_query
from kernels.kv_insert import triton_impl as kv_insert
from kernels.page_cache.cuda_pages import PagesArg, aligned, is_aligned, pages_argument
from kernels.page_layout import PageLayout
from kernels.q_norm_rope import triton_impl as q_norm_rope

_FOLDER = Path(__file__).parent / "cuda"
ROW_MATH, CLUSTER = _FOLDER / "row_math.cuh", _FOLDER / "cluster.cuh"
LATENTS = _FOLDER / "latents.cuh"
_FLOATS = (torch.float32, torch.bfloat16)
PAIRS = 32  # rotary pairs, one per lane
LATENT_DIMS, INDEX_DIMS = (128, 512), (64, 128)


class _Call(ctypes.Structure):
    """``Call`` of qkv.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "kv", "index", "weight", "positions")),
        *((name, ctypes.c_void_p) for name in ("slots", "inv_freq")),
        *((name, ctypes.c_void_p) for name in ("q_out", "kv_out", "index_out")),
        *((name, ctypes.c_int64) for name in ("q_stride", "q_head_stride", "kv_stride")),
        *((name, ctypes.c_int64) for name in ("index_stride", "index_head_stride", "tokens")),
        ("pages", PagesArg),
        ("eps", ctypes.c_float),
        ("index_scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("q_heads", "index_heads", "dim", "index_dim")),
        *((name, ctypes.c_int) for name in ("is_f32", "weight_f32", "weight_early", "quantize")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(_FOLDER / "qkv.cu", ROW_MATH, LATENTS)
    library.causeway_qkv_norm_rope.argtypes = (ctypes.POINTER(_Call), ctypes.c_void_p)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def takes(rows: Tensor, inv_freq: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether the kernel computes rows of this dtype and width."""
    return rows.dtype in _FLOATS and inv_freq.numel() == PAIRS and rows.shape[-1] in dims


def launch_rows(
    positions: Tensor,
    inv_freq: Tensor,
    *,
    eps: float = 0.0,
    quantize: bool = False,
    q: Tensor | None = None,
    kv: Tensor | None = None,
    weight: Tensor | None = None,
    index_q: Tensor | None = None,
    pages: tuple[Tensor, PageLayout, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Query heads, latents and indexer heads of the rows that are given; ``pages`` is of the latents."""
    call = _Call(eps=eps, quantize=quantize, tokens=positions.shape[0], dim=LATENT_DIMS[-1])
    call.positions, call.inv_freq = positions.data_ptr(), inv_freq.data_ptr()
    outs = [None if x is None else _like(x) for x in (q, kv, index_q)]
    held = [None if x is None else aligned(x) for x in (q, kv, index_q)]
    first = next(x for x in held if x is not None)
    call.is_f32 = first.dtype is torch.float32
    if q is not None and held[0] is not None:
        call.q, call.q_out, call.dim = held[0].data_ptr(), _pointer(outs[0]), q.shape[2]
        call.q_stride, call.q_head_stride, call.q_heads = *held[0].stride()[:2], q.shape[1]
    if kv is not None and held[1] is not None and weight is not None:
        # Weights stand still, and are read while the kernel ahead still runs; a copy is what it writes.
        call.weight_early = is_aligned(weight)
        weight = aligned(weight)
        call.kv, call.kv_out, call.dim = held[1].data_ptr(), _pointer(outs[1]), kv.shape[1]
        call.kv_stride = held[1].stride(0)
        call.weight, call.weight_f32 = weight.data_ptr(), weight.dtype is torch.float32
    if index_q is not None and held[2] is not None:
        call.index, call.index_out = held[2].data_ptr(), _pointer(outs[2])
        call.index_stride, call.index_head_stride = held[2].stride()[:2]
        call.index_heads, call.index_dim = index_q.shape[1:]
        call.index_scale = float(index_q.shape[2]) ** -0.5
    if pages is not None:
        pool, layout, slots = pages
        call.pages, call.slots = pages_argument(pool, layout), slots.data_ptr()
    if call.tokens:
        code = _library().causeway_qkv_norm_rope(ctypes.byref(call), nvcc.stream(first))
        nvcc.check_launch("qkv_norm_rope", code)
    return outs[0], outs[1], outs[2]


def qkv_norm_rope(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    quantize: bool,
    index_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``kernels.qkv_norm_rope.api.qkv_norm_rope``."""
    fits = index_q is None or takes(index_q, inv_freq, INDEX_DIMS)
    if fits and takes(q, inv_freq, LATENT_DIMS):
        heads, latents, index = launch_rows(
            positions,
            inv_freq,
            eps=eps,
            quantize=quantize,
            q=q,
            kv=kv,
            weight=kv_weight,
            index_q=index_q,
            pages=(pool, layout, slots),
        )
        if heads is not None and latents is not None:
            return heads, latents, index
    heads = q_norm_rope.q_norm_rope(q, positions, inv_freq, eps)
    latents = kv_insert.kv_insert(
        kv, kv_weight, positions, inv_freq, eps, pool, layout, slots, quantize=quantize
    )
    if index_q is None:
        return heads, latents, None
    return heads, latents, index_query.index_query(index_q, positions, inv_freq, quantize=quantize)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
