"""RoPE over rows of heads, with or without the weightless norm of a query head in front."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rope import reference
from kernels.triton_math import padded, sincos, twin_for_float64

_HEADS, _WARPS = 16, 4  # rows and warps of a tile; a row lies in one warp
_FILL = 528  # programs that fill the machine; more tokens than that loop over their heads


@triton.jit
def _norm(x, eps, D: tl.constexpr, NARROW: tl.constexpr):
    """Factor [rows, 1] of the official query norm: each step rounded to the rows' dtype."""
    square = x * x
    if NARROW:
        square = square.to(tl.bfloat16).to(tl.float32)
    mean = tl.sum(square, axis=1) / D
    if NARROW:
        mean = mean.to(tl.bfloat16).to(tl.float32)
    total = mean + eps
    if NARROW:
        total = total.to(tl.bfloat16).to(tl.float32)
    factor = tl.rsqrt(total)
    if NARROW:
        factor = factor.to(tl.bfloat16).to(tl.float32)
    return factor[:, None]


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _rotate_heads(
    x, out, positions, inv_freq, stride_t, stride_h, eps, H, LOOP,
    D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, PP: tl.constexpr, BH: tl.constexpr,
    NORM: tl.constexpr, INVERSE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dtype = out.dtype.element_ty
    keep: tl.constexpr = D - 2 * PAIRS
    col = tl.arange(0, P)
    tail = tl.arange(0, 2 * PP)
    pair = tl.arange(0, PP)
    freq = tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0)
    sin, cos = sincos(tl.load(positions + token).to(tl.float32) * freq)
    if INVERSE:
        sin = -sin
    for block in range(LOOP):
        head = (tl.program_id(1) * LOOP + block) * BH + tl.arange(0, BH)
        start = token * stride_t + head[:, None].to(tl.int64) * stride_h
        target = (token * H + head[:, None]) * D
        # The kept columns and the rotary ones are two tiles: only the second needs pairs.
        inside = (head < H)[:, None] & (col < (D if NORM else keep))[None, :]
        row = tl.load(x + start + col[None, :], mask=inside, other=0.0).to(tl.float32)
        in_tail = (head < H)[:, None] & (tail < 2 * PAIRS)[None, :]
        end = tl.load(x + start + (keep + tail)[None, :], mask=in_tail, other=0.0).to(tl.float32)
        if NORM:
            factor = _norm(row, eps, D, NARROW)
            row = row * factor
            end = (end * factor).to(dtype).to(tl.float32)
        kept = (head < H)[:, None] & (col < keep)[None, :]
        tl.store(out + target + col[None, :], row.to(dtype), mask=kept)
        even, odd = tl.split(tl.reshape(end, (BH, PP, 2)))
        first = even * cos[None, :] - odd * sin[None, :]
        second = even * sin[None, :] + odd * cos[None, :]
        end = tl.reshape(tl.join(first, second), (BH, 2 * PP))
        tl.store(out + target + (keep + tail)[None, :], end.to(dtype), mask=in_tail)


def rotate_heads(
    x: Tensor, positions: Tensor, inv_freq: Tensor, *, eps: float | None, inverse: bool
) -> Tensor:
    """RoPE of [T, H, d]; with ``eps`` the query norm before it. Returns a contiguous tensor."""
    tokens, heads, dim = x.shape
    out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = min(_HEADS, padded(heads))
    blocks = triton.cdiv(heads, rows)
    loop = blocks if tokens >= _FILL else 1
    pairs = inv_freq.numel()
    _rotate_heads[(tokens, triton.cdiv(blocks, loop))](
        x, out, positions, inv_freq, x.stride(0), x.stride(1), eps or 0.0, heads, loop,
        D=dim, P=padded(dim), PAIRS=pairs, PP=padded(pairs), BH=rows, NORM=eps is not None,
        INVERSE=inverse, NARROW=x.dtype is torch.bfloat16,
        num_warps=min(_WARPS, rows), enable_fp_fusion=False,
    )  # fmt: skip
    return out


@twin_for_float64(reference.apply_rope)
def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """See ``kernels.rope.api.apply_rope``."""
    if x.dim() == 3:
        return rotate_heads(x, positions, inv_freq, eps=None, inverse=inverse)
    # Rows without heads: a tile may only span the heads of one token, so each row is one head.
    return rotate_heads(x[:, None], positions, inv_freq, eps=None, inverse=inverse)[:, 0]
