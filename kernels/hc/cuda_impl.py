"""Hyper-connections in CUDA C++ for what is served: bfloat16, four streams, wide rows.

Other shapes and float32 take the Triton kernels of this folder. Groups of blocks wait for each other,
so all blocks of a launch must fit on the device at once, and two launches must not overlap: these ops
belong to one stream of a device. The first call on a device allocates and compiles; make it before a
graph is captured.
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
from kernels.triton_math import twin_for_float64

_CUDA = Path(__file__).parent / "cuda"
_SOURCES = [_CUDA / name for name in ("hc.cu", "hc_math.cuh", "hc_tiles.cuh", "hc_few.cuh")]
_STREAMS, _SLAB, _TILE, _RING, _SUMS = 4, 256, 16, 8, 448  # as in the sources
_WARPS = 16  # whose sums of few tokens are kept apart
_FEW = 64  # tokens up to which the streams are made by an op of their own
_COLUMNS = 1024  # of a block that finishes one of few tokens
_MAX_SLABS = 28  # whose sums fit beside the tiles
_MIN_SLABS = 16  # each block of a group finishes the factors of one token of a tile
_PRE, _HEAD, _POST_PRE = range(3)


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    load_library(*_SOURCES)


@functools.cache
def _workspace(device: torch.device) -> tuple[int, Tensor, Tensor]:
    """Blocks that run at once, the ring of sums and the flags (zero between launches)."""
    blocks = int(load_library(*_SOURCES).causeway_hc_blocks())
    ring = torch.zeros(blocks * max(_RING, _WARPS) * _SUMS, dtype=torch.float32, device=device)
    flags = torch.zeros(blocks * _RING + 1, dtype=torch.int32, device=device)
    return blocks, ring, flags


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it if a row does not start at a multiple of 16 bytes."""
    whole = all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if whole else x.contiguous()


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

    With ``mixed`` = (a, post, comb) of the sub-layer before, ``x`` goes through ``hc_post`` first.
    """
    tokens, r, dim = x.shape
    fn, scale, base = fn.contiguous(), scale.contiguous(), base.contiguous()
    if mixed is not None:
        mixed = (mixed[0], mixed[1].contiguous(), mixed[2].contiguous())
    fits = r == _STREAMS and dim % _COLUMNS == 0 and _MIN_SLABS <= dim // _SLAB <= _MAX_SLABS
    blocks = _workspace(x.device)[0] if fits and x.dtype is torch.bfloat16 else 0
    if tokens == 0 or blocks < max(1, dim // _SLAB):
        streams = x if mixed is None else hc_post(mixed[0], x, mixed[1], mixed[2])
        return streams, *triton_collapse(
            streams, fn, scale, base, iters=iters, eps=eps, norm_eps=norm_eps
        )
    _, ring, flags = _workspace(x.device)
    if mixed is not None and tokens <= _FEW:
        x, mixed = hc_post(mixed[0], x, mixed[1], mixed[2]), None
    x = _aligned(x)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    post = new((tokens, r) if iters else (0,))
    comb = new((tokens, r, r) if iters else (0,))
    streams, old = x, None
    if mixed is not None:
        streams = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        old = tuple(map(_aligned, mixed))
    a, old_post, old_comb = old or (None, None, None)
    groups = min(blocks // (dim // _SLAB), -(-tokens // _TILE))
    mode = _POST_PRE if mixed is not None else _PRE if iters else _HEAD
    code = load_library(*_SOURCES).causeway_hc(
        ctypes.c_int(mode),
        pointer(x),
        ctypes.c_int64(x.stride(0)),
        ctypes.c_int64(x.stride(1)),
        pointer(a),
        ctypes.c_int64(0 if a is None else a.stride(0)),
        *map(pointer, (old_post, old_comb, fn, scale, base, streams, out, post, comb)),
        pointer(ring),
        pointer(flags),
        ctypes.c_int64(tokens),
        ctypes.c_int(dim),
        ctypes.c_int(groups),
        ctypes.c_int(iters),
        ctypes.c_float(eps),
        ctypes.c_float(norm_eps),
        stream(x),
    )
    check_launch("hc", code)
    return streams, out, post, comb


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
