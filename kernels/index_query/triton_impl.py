"""The indexer's query: RoPE, Hadamard rotation (a tensor-core product) and FP4 rounding at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.index_query import reference
from kernels.triton_math import (
    FP4_BLOCK,
    fake_fp4,
    hadamard_rows,
    padded,
    rotate_row_tail,
    sylvester,
    twin_for_float64,
)

_HEADS, _WARPS, _STAGES = 64, 4, 1  # rows and warps of a tile, tiles in flight
_PROGRAMS = 132 * 16  # more tokens than that make a program walk over several


@triton.jit(do_not_specialize=["T", "LOOP"], do_not_specialize_on_alignment=["positions"])
def _index_query(
    q, positions, inv_freq, out, stride_t, stride_h, scale, T, H, LOOP,
    D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, SHIFT: tl.constexpr, BH: tl.constexpr,
    QUANT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    dtype = out.dtype.element_ty
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    col = tl.arange(0, P) - SHIFT
    real = (head < H)[:, None] & ((col >= 0) & (col < D))[None, :]
    if QUANT:
        matrix = sylvester(P)
    for step in range(LOOP):
        token = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)
        inside = real & (token < T)
        start = token * stride_t + head[:, None].to(tl.int64) * stride_h + col[None, :]
        x = tl.load(q + start, mask=inside, other=0.0).to(tl.float32)
        position = tl.load(positions + token, mask=token < T, other=0).to(tl.float32)
        x = rotate_row_tail(x, position + tl.zeros((1,), tl.float32), inv_freq,
                            (D - 2 * PAIRS + SHIFT) // 2, PAIRS)  # fmt: skip
        x = x.to(dtype).to(tl.float32)
        if QUANT:
            x = hadamard_rows(x, matrix, scale, NARROW).to(dtype).to(tl.float32)
            x = fake_fp4(x)
        target = out + (token * H + head[:, None]) * D + col[None, :]
        tl.store(target, x.to(dtype), mask=inside)


@twin_for_float64(reference.index_query)
def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, quantize: bool) -> Tensor:
    """See ``kernels.index_query.api.index_query``."""
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    step = min(tokens, _PROGRAMS)
    shift = dim & 1
    block = _HEADS if heads > _HEADS // 4 else _HEADS // 4
    _index_query[(step, triton.cdiv(heads, block))](
        q, positions, inv_freq, out, q.stride(0), q.stride(1), float(dim) ** -0.5,
        tokens, heads, triton.cdiv(tokens, step),
        D=dim, P=padded(dim + shift, FP4_BLOCK.value), PAIRS=inv_freq.numel(), SHIFT=shift,
        BH=block, QUANT=quantize, NARROW=q.dtype is torch.bfloat16, num_warps=_WARPS, num_stages=_STAGES,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
