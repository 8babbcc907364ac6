"""Hyper-connections in two launches: partial mixes of a slab of columns, then factors and collapse.

The mix is a float32 product on the tensor cores: the f32 weight is three bf16 parts that add up to it,
so every product of a bf16 stream value is exact. A chunk of columns is one tensor-core sum; chunks and
slabs are added in float32 in a fixed order. The tiles do not depend on the number of tokens.
"""
# mypy: disable-error-code="assignment"
# (the tuples of a kernel grow step by step)

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hc import reference
from kernels.triton_math import padded, twin_for_float64

_TOKENS = 64  # rows of a product tile
_SLAB = 256  # columns of each stream in one program
_CHUNK = 32  # columns of each stream in one tensor-core sum
_COLUMNS, _PER_THREAD = 2048, 8  # of a program and a thread of hc_post
_TOGETHER, _BLOCK = 16, 256  # tokens and columns of a program that collapses many
_FEW = 64  # tokens up to which chunks, and the columns of a token, have their own programs


@triton.jit
def mix_streams(a, x, post, comb, K: tl.constexpr, R: tl.constexpr):
    """Stream K of ``hc_post``: ``a`` and the tuple ``x`` f32, factors broadcastable to them."""
    mixed = post[K] * a
    for j in tl.static_range(R):
        mixed = tl.fma(comb[j * R + K] + tl.zeros_like(a), x[j], mixed)
    return mixed


@triton.jit
def _weight_dot(x, f, total, NARROW: tl.constexpr):
    """``total + x @ f^T``: bf16 x with f32 f in three parts, or float32 throughout."""
    if NARROW:
        high = f.to(tl.bfloat16)
        rest = f - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(x, tl.trans(low), total)
        total = tl.dot(x, tl.trans(middle), total)
        total = tl.dot(x, tl.trans(high), total)
    else:
        total = tl.dot(x, tl.trans(f), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def _partials(
    x, fn, partial, stride_t, stride_r, T,
    D: tl.constexpr, R: tl.constexpr, MIX: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Mixes of CHUNKS chunks: partial[t, program, :MIX], and the sum of squares in column MIX."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = row < T
    mix = tl.arange(0, NP)
    total = tl.zeros((BT, NP), tl.float32)
    square = tl.zeros((BT,), tl.float32)
    for chunk in range(CHUNKS):
        col = (tl.program_id(1) * CHUNKS + chunk) * CHUNK + tl.arange(0, CHUNK)
        inside = live[:, None] & (col < D)[None, :]
        source = x + row[:, None] * stride_t + col[None, :]
        part = tl.zeros((BT, NP), tl.float32)
        squares = tl.zeros((BT, CHUNK), tl.float32)
        for k in tl.static_range(R):
            tile = tl.load(source + k * stride_r, mask=inside, other=0.0)
            wide = tile.to(tl.float32)
            squares = tl.fma(wide, wide, squares)
            f = tl.load(
                fn + mix[:, None] * (R * D) + (k * D + col)[None, :],
                mask=(mix < MIX)[:, None] & (col < D)[None, :],
                other=0.0,
            )
            part = _weight_dot(tile, f, part, x.dtype.element_ty == tl.bfloat16)
        total = total + part
        square = square + tl.sum(squares, axis=1)
    total = tl.where((mix == MIX)[None, :], square[:, None], total)
    target = partial + (row[:, None] * PARTS + tl.program_id(1)) * NP + mix[None, :]
    tl.store(target, total, mask=live[:, None])


@triton.jit
def _column(tile, index, WANTED: tl.constexpr):
    """Column WANTED of ``tile`` [rows, n], exactly: [rows], or a scalar for a single row."""
    masked = tl.where((index == WANTED)[None, :], tile, 0.0)
    if tile.shape[0] == 1:
        column = tl.sum(masked)
    else:
        column = tl.sum(masked, axis=1)
    return column


@triton.jit
def _divide_lines(c, eps, R: tl.constexpr, ROWS: tl.constexpr):
    """The R * R tensors of ``c`` divided by their row (or column) sums plus eps."""
    inverse = ()
    for line in tl.static_range(R):
        total = c[line * R] if ROWS else c[line]
        for i in tl.static_range(1, R):
            total = total + (c[line * R + i] if ROWS else c[i * R + line])
        inverse = inverse + (1.0 / (total + eps),)
    out = ()
    for i in tl.static_range(R * R):
        out = out + (c[i] * (inverse[i // R] if ROWS else inverse[i % R]),)
    return out


@triton.jit
def _doubly_stochastic(c, eps, ITERS: tl.constexpr, R: tl.constexpr):
    """Row softmax plus eps, then columns and ITERS - 1 times rows and columns."""
    soft = ()
    for j in tl.static_range(R):
        top = c[j * R]
        for k in tl.static_range(1, R):
            top = tl.maximum(top, c[j * R + k])
        for k in tl.static_range(R):
            soft = soft + (tl.exp(c[j * R + k] - top),)
    soft = _divide_lines(soft, 0.0, R, True)
    raised = ()
    for i in tl.static_range(R * R):
        raised = raised + (soft[i] + eps,)
    c = _divide_lines(raised, eps, R, False)
    for _ in range(ITERS - 1):
        c = _divide_lines(_divide_lines(c, eps, R, True), eps, R, False)
    return c


@triton.jit(do_not_specialize=["T"])
def _collapse(
    partial, x, scale, base, out, post, comb, stride_t, stride_r, eps, norm_eps, T,
    D: tl.constexpr, R: tl.constexpr, MIX: tl.constexpr, NP: tl.constexpr, SLABS: tl.constexpr,
    PARTS: tl.constexpr, ITERS: tl.constexpr, TB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Factors of TB tokens, and BLOCKS blocks of columns of their collapsed rows. ITERS 0: head."""
    row = tl.program_id(0).to(tl.int64) * TB + tl.arange(0, TB)
    live = row < T
    n = tl.arange(0, NP)
    mix = tl.zeros((TB, NP), tl.float32)
    source = partial + row[:, None] * (SLABS * PARTS * NP) + n[None, :]
    # A slab is the sum of its parts, whether one program added them or they are added here.
    for slab in tl.static_range(SLABS):
        slab_mix = tl.zeros((TB, NP), tl.float32)
        for part in tl.static_range(PARTS):
            at = source + (slab * PARTS + part) * NP
            slab_mix = slab_mix + tl.load(at, mask=live[:, None], other=0.0)
        mix = mix + slab_mix
    norm = tl.rsqrt(_column(mix, n, MIX) / (R * D) + norm_eps)
    weight = tl.load(scale)
    if ITERS > 0:
        weight = tl.where(
            n < R, weight, tl.where(n < 2 * R, tl.load(scale + 1), tl.load(scale + 2))
        )
    bias = tl.load(base + n, mask=n < MIX, other=0.0)
    if TB > 1:
        norm = norm[:, None]
    mix = mix * norm * weight + bias[None, :]
    gate = 1.0 / (1.0 + tl.exp(-mix))
    if ITERS > 0:
        first = tl.program_id(1) == 0
        mask = live[:, None] & ((n >= R) & (n < 2 * R))[None, :] & first
        tl.store(post + row[:, None] * R + (n - R)[None, :], 2.0 * gate, mask=mask)
        if first:
            c = ()
            for i in tl.static_range(R * R):
                c = c + (_column(mix, n, 2 * R + i),)
            c = _doubly_stochastic(c, eps, ITERS, R)
            for i in tl.static_range(R * R):
                if TB > 1:
                    tl.store(comb + row * (R * R) + i, c[i], mask=live)
                else:
                    tl.store(comb + tl.program_id(0).to(tl.int64) * (R * R) + i, c[i])
    pre = ()
    for j in tl.static_range(R):
        one = _column(gate, n, j) + eps
        if TB > 1:
            one = one[:, None]
        pre = pre + (one,)
    for block in range(BLOCKS):
        col = (tl.program_id(1) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = live[:, None] & (col < D)[None, :]
        stream = x + row[:, None] * stride_t + col[None, :]
        total = tl.zeros((TB, BLOCK), tl.float32)
        for j in tl.static_range(R):
            tile = tl.load(stream + j * stride_r, mask=inside, other=0.0).to(tl.float32)
            total = tl.fma(pre[j] + tl.zeros_like(tile), tile, total)
        target = out + row[:, None] * D + col[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _post(
    a, x, post, comb, out, stride_a, stride_t, stride_r,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    value = tl.load(a + row * stride_a + col, mask=inside, other=0.0).to(tl.float32)
    old = ()
    for j in tl.static_range(R):
        tile = tl.load(x + row * stride_t + j * stride_r + col, mask=inside, other=0.0)
        old = old + (tile.to(tl.float32),)
    factors = ()
    matrix = ()
    for k in tl.static_range(R):
        factors = factors + (tl.load(post + row * R + k),)
    for i in tl.static_range(R * R):
        matrix = matrix + (tl.load(comb + row * R * R + i),)
    for k in tl.static_range(R):
        mixed = mix_streams(value, old, factors, matrix, k, R)
        tl.store(out + (row * R + k) * D + col, mixed.to(out.dtype.element_ty), mask=inside)


def collapse(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, post, comb)`` of ``hc_pre`` (iters > 0) or ``hc_head`` (0: no post, no comb)."""
    tokens, r, dim = x.shape
    mixes, slabs = fn.shape[0], triton.cdiv(dim, _SLAB)
    count = padded(mixes + 1, 16)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    post = new((tokens, r) if iters else (0,))
    comb = new((tokens, r, r) if iters else (0,))
    if out.numel() == 0:
        return out, post, comb
    x = x.contiguous()  # strides decide how Triton lays out a load, and that how it adds up
    few = tokens <= _FEW
    parts = _SLAB // _CHUNK if few else 1  # of a slab, each one program
    partial = new((tokens, slabs * parts, count))
    _partials[(triton.cdiv(tokens, _TOKENS), slabs * parts)](
        x, fn, partial, x.stride(0), x.stride(1), tokens,
        D=dim, R=r, MIX=mixes, NP=count, PARTS=slabs * parts, CHUNKS=_SLAB // _CHUNK // parts,
        CHUNK=_CHUNK, BT=_TOKENS, num_warps=4,
    )  # fmt: skip
    block = min(1024 if few else _BLOCK, padded(dim))
    blocks = triton.cdiv(dim, block)
    split = blocks if few else min(blocks, 2)
    _collapse[(tokens if few else triton.cdiv(tokens, _TOGETHER), split)](
        partial, x, scale, base, out, post, comb, x.stride(0), x.stride(1), eps, norm_eps, tokens,
        D=dim, R=r, MIX=mixes, NP=count, SLABS=slabs, PARTS=parts, ITERS=iters,
        TB=1 if few else _TOGETHER, BLOCK=block, BLOCKS=triton.cdiv(blocks, split), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out, post, comb


@twin_for_float64(reference.hc_post)
def hc_post(a: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ``kernels.hc.api.hc_post``."""
    tokens, r, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(_COLUMNS, padded(dim, 32))
        _post[(tokens, triton.cdiv(dim, block))](
            a, x, post.contiguous(), comb.contiguous(), out,
            a.stride(0), x.stride(0), x.stride(1), D=dim, R=r, BLOCK=block,
            num_warps=max(1, block // (32 * _PER_THREAD)),
        )  # fmt: skip
    return out
