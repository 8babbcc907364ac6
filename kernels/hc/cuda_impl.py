"""Hyper-connections in CUDA C++ for what is served: bfloat16, four streams, wide rows.

Other shapes and float32 take the Triton kernels of this folder. Up to ``_FEW`` tokens one launch does
everything, the RMSNorm and the FP8 form behind included; above, a small one behind it makes comb.
Groups of blocks wait for each other, so all blocks of a launch must fit on the device at once, and two
such launches must not overlap: these ops belong to one stream of a device. ``fn`` and the norm's weight
must not be written by the kernel directly ahead in the stream, which may still run when they are read.
The first call on a device allocates and compiles; make it before a graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.hc import reference
from kernels.hc.triton_impl import collapse as triton_collapse
from kernels.hc.triton_impl import hc_post as hc_post
from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.quant_rows.api import QuantRows, columns_argument, empty_quant_rows, rms_norm_quant
from kernels.triton_math import twin_for_float64

_CUDA = Path(__file__).parent / "cuda"
_SOURCES = [
    *(_CUDA / "hc.cu", *sorted(_CUDA.glob("*.cuh"))),
    Path(__file__).parents[1] / "quant_rows" / "cuda" / "scale_columns.cuh",
]
_STREAMS, _SLAB, _TILE = 4, 256, 16  # as in the sources
_RING, _SUMS, _OWNED_RING, _OWNED_SUMS = 16, 20, 10, 2  # tiles kept, words of a token and slab
_FEW = 64  # tokens up to which clusters run
_SLAB_WORDS = 32  # of a token and a slab
_MULTIPLE = 1024  # columns come in multiples of this
_SLABS = range(16, 29)  # blocks of a group that the kernels take
_PRE, _HEAD, _POST_PRE = range(3)


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    load_library(*_SOURCES)


@functools.cache
def _workspace(device: torch.device) -> tuple[int, Tensor, Tensor]:
    """Blocks that run at once; the ring of tagged words; the epoch of the tags and a counter."""
    blocks = int(load_library(*_SOURCES).causeway_hc_blocks())
    words = blocks * _TILE * (_RING * _SUMS + _OWNED_RING * _OWNED_SUMS)
    ring = torch.zeros(words, dtype=torch.int64, device=device)
    return blocks, ring, torch.zeros(2, dtype=torch.int32, device=device)


@functools.cache
def _few_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tagged words of a launch for few tokens, and the counter that their tags come from."""
    new = functools.partial(torch.zeros, dtype=torch.int64, device=device)
    return new(_FEW * _SLABS[-1] * _SLAB_WORDS), new(1)


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it if a row does not start at a multiple of 16 bytes."""
    whole = all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def collapse(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    mixed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(streams, out, post, comb)`` of ``hc_pre`` (iters > 0) or ``hc_head`` (0: no post, no comb).

    With ``mixed`` = (a, post, comb) of the sub-layer before, ``x`` goes through ``hc_post`` first; ``a``
    is rounded to the streams' dtype.
    """
    tokens, _, dim = x.shape
    if tokens == 0 or not _fits(x):
        mixed = _narrow(mixed, x.dtype)
        streams = x if mixed is None else hc_post(mixed[0], x, mixed[1], mixed[2])
        return streams, *triton_collapse(
            streams,
            fn.contiguous(),
            scale.contiguous(),
            base.contiguous(),
            iters=iters,
            eps=eps,
            norm_eps=norm_eps,
        )
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    streams, post, comb = _launch(
        x, fn, scale, base, out, iters=iters, eps=eps, norm_eps=norm_eps, mixed=mixed
    )
    return streams, out, post, comb


def collapse_norm(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    rms_eps: float,
    mixed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, QuantRows, Tensor, Tensor]:
    """``(streams, normed, rows, post, comb)``: ``collapse``, then ``rms_norm_quant``, fused."""
    tokens, _, dim = x.shape
    if tokens == 0 or not _fits(x):
        streams, out, post, comb = collapse(
            x, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps, mixed=mixed
        )
        return streams, *rms_norm_quant(out, norm_weight, rms_eps), post, comb
    normed = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    rows = empty_quant_rows(tokens, dim, x.device, for_pieces=True)
    streams, post, comb = _launch(
        x,
        fn,
        scale,
        base,
        normed,
        iters=iters,
        eps=eps,
        norm_eps=norm_eps,
        mixed=mixed,
        norm=(_aligned(norm_weight.contiguous()), rows, rms_eps),
    )
    return streams, normed, rows, post, comb


def _narrow(
    mixed: tuple[Tensor, Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``mixed`` with its first tensor in ``dtype``."""
    return None if mixed is None else (mixed[0].to(dtype), *mixed[1:])


def _fits(x: Tensor) -> bool:
    """Whether the CUDA kernels take these streams."""
    _, r, dim = x.shape
    if x.dtype is not torch.bfloat16 or r != _STREAMS or dim % _MULTIPLE:
        return False
    return dim // _SLAB in _SLABS and _workspace(x.device)[0] >= dim // _SLAB


def _most_of_few(x: Tensor) -> int:
    """Tokens up to which one launch does everything: its blocks must run at once."""
    return min(_FEW, _TILE * (_workspace(x.device)[0] // (x.shape[2] // _SLAB)))


def _launch(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    out: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    mixed: tuple[Tensor, Tensor, Tensor] | None,
    norm: tuple[Tensor, QuantRows, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``out`` (and the rows of ``norm``); returns the streams, post and comb."""
    tokens, r, dim = x.shape
    blocks, ring, flags = _workspace(x.device)
    groups = blocks // (dim // _SLAB)
    x, fn = _aligned(x), _aligned(fn.contiguous())
    scale, base = scale.contiguous(), base.contiguous()
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    post = new((tokens, r) if iters else (0,))
    comb = new((tokens, r, r) if iters else (0,))
    few = tokens <= _most_of_few(x)
    if few:
        ring, flags = _few_workspace(x.device)
    else:
        mixed = _narrow(mixed, x.dtype)
    streams, a = x, None
    old: tuple[Tensor | None, ...] = (None, None)
    if mixed is not None:
        streams = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        a, old = _aligned(mixed[0]), tuple(_aligned(f.contiguous()) for f in mixed[1:])
    weight, rows, rms_eps = norm or (None, None, 0.0)
    columns, shift = (None, 0) if rows is None else columns_argument(rows)
    code = load_library(*_SOURCES).causeway_hc(
        ctypes.c_int(_POST_PRE if mixed is not None else _PRE if iters else _HEAD),
        ctypes.c_int(few),
        pointer(x),
        ctypes.c_int64(x.stride(0)),
        ctypes.c_int64(x.stride(1)),
        pointer(a),
        ctypes.c_int64(0 if a is None else a.stride(0)),
        ctypes.c_int(a is not None and a.dtype is not x.dtype),
        *map(pointer, (*old, fn, scale, base, weight)),
        ctypes.c_int(weight is not None and weight.dtype is torch.float32),
        *map(pointer, (streams, out, post, comb)),
        pointer(None if rows is None else rows.q),
        ctypes.c_int64(0 if rows is None else rows.q.stride(0)),
        pointer(None if rows is None else rows.scale),
        ctypes.c_int64(0 if rows is None else rows.scale.stride(0)),
        ctypes.c_void_p(columns),
        ctypes.c_int(shift),
        pointer(ring),
        pointer(flags),
        ctypes.c_int64(tokens),
        ctypes.c_int(dim),
        ctypes.c_int(groups if few else min(groups, -(-tokens // _TILE))),
        ctypes.c_int(blocks),
        ctypes.c_int(iters),
        ctypes.c_float(eps),
        ctypes.c_float(norm_eps),
        ctypes.c_float(rms_eps),
        stream(x),
    )
    check_launch("hc", code)
    return streams, post, comb


@twin_for_float64(reference.hc_pre)
def hc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.hc.api.hc_pre``."""
    return collapse(x, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps)[1:]


@twin_for_float64(reference.hc_head)
def hc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See ``kernels.hc.api.hc_head``."""
    return collapse(x, fn, scale, base, iters=0, eps=eps, norm_eps=norm_eps)[1]
