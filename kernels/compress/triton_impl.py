"""The compressor's pooling with all that follows it in one pass.

Ratio 4: the eight rows of an entry are read, pooled, normed, rotated, rounded and written (to rows or
to pages) by one program. Ratio 128: a first kernel pools 64 channels of an entry per program, since
an entry reads half a megabyte; the second does the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compress import reference
from kernels.page_cache.triton_pages import (
    BF16_ROWS,
    FP8_INDEX,
    FP8_LATENT,
    NO_PAGES,
    encode_index,
    encode_latent,
    locate,
    page_constants,
    put_codes,
    put_index,
    put_plain,
    round_latent,
)
from kernels.page_layout import PageLayout
from kernels.triton_math import (
    QUANT_BLOCK,
    fake_fp4,
    fake_fp8,
    hadamard_rows,
    padded,
    rotate_row_tail,
    sylvester,
    twin_for_float64,
)

_CHANNELS, _WIDE_WARPS = 32, 4  # of one program of the wide pooling
# Entries and warps of a program with a Hadamard product: at least 16 rows fill its matrix unit.
_INDEX_ENTRIES, _INDEX_WARPS = 16, 4
_MAIN_COLUMNS = 128  # of a warp of a program that pools one latent
_POOLED_ENTRIES = 4


@triton.jit
def _slot(rows, row_index, col, inside, stride, SLOT: tl.constexpr, WIDTH: tl.constexpr):
    """(u, g) [BE, P] of one slot of each entry; a missing row has u = 0 and g = -inf."""
    index = tl.load(row_index + SLOT, mask=inside[0], other=-1)
    start = rows + index[:, None] * stride + col[None, :]
    mask = (index >= 0)[:, None] & inside[1][None, :]
    u = tl.load(start, mask=mask, other=0.0)
    g = tl.load(start + WIDTH, mask=mask, other=float("-inf"))
    return u, g


@triton.jit
def _pool8(rows, row_index, col, inside, stride, D: tl.constexpr):
    """Pooled f32 [BE, P] of 4 rows of the previous group and 4 of the own one."""
    width: tl.constexpr = 2 * D
    own = col + D
    u0, g0 = _slot(rows, row_index, col, inside, stride, 0, width)
    u1, g1 = _slot(rows, row_index, col, inside, stride, 1, width)
    u2, g2 = _slot(rows, row_index, col, inside, stride, 2, width)
    u3, g3 = _slot(rows, row_index, col, inside, stride, 3, width)
    u4, g4 = _slot(rows, row_index, own, inside, stride, 4, width)
    u5, g5 = _slot(rows, row_index, own, inside, stride, 5, width)
    u6, g6 = _slot(rows, row_index, own, inside, stride, 6, width)
    u7, g7 = _slot(rows, row_index, own, inside, stride, 7, width)
    low = tl.maximum(tl.maximum(g0, g1), tl.maximum(g2, g3))
    top = tl.maximum(low, tl.maximum(tl.maximum(g4, g5), tl.maximum(g6, g7)))
    top = tl.where(top == float("-inf"), 0.0, top)
    w0, w1, w2, w3 = tl.exp(g0 - top), tl.exp(g1 - top), tl.exp(g2 - top), tl.exp(g3 - top)
    w4, w5, w6, w7 = tl.exp(g4 - top), tl.exp(g5 - top), tl.exp(g6 - top), tl.exp(g7 - top)
    total = ((((((w0 + w1) + w2) + w3) + w4) + w5) + w6) + w7
    pooled = w0 * u0 + w1 * u1 + w2 * u2 + w3 * u3 + w4 * u4 + w5 * u5 + w6 * u6 + w7 * u7
    return pooled / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize_on_alignment=["row_index"])
def _pool_wide(
    rows, row_index, out, stride, index_stride,
    D: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    col = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.load(row_index + entry * index_stride + slot)
    start = rows + index[:, None] * stride + col[None, :]
    mask = (index >= 0)[:, None] & (col < D)[None, :]
    g = tl.load(start + D, mask=mask, other=float("-inf"))
    u = tl.load(start, mask=mask, other=0.0)
    top = tl.max(g, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(g - top[None, :])
    total = tl.sum(weight, axis=0)
    pooled = tl.sum(weight * u, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + entry * D + col, pooled.to(out.dtype.element_ty), mask=col < D)


@triton.jit(
    do_not_specialize=["E"], do_not_specialize_on_alignment=["row_index", "positions", "slots"]
)
def _entries(
    rows, row_index, weight, positions, inv_freq, out, pool, slots,
    stride, index_stride, page_stride, eps, scale, E,
    D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, SHIFT: tl.constexpr, BE: tl.constexpr,
    POOL: tl.constexpr, INDEX: tl.constexpr, QUANT: tl.constexpr, NARROW: tl.constexpr,
    FORMAT: tl.constexpr, N: tl.constexpr, PAYLOAD: tl.constexpr, SCALE_OFFSET: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    keep: tl.constexpr = D - 2 * PAIRS
    entry = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    live = entry < E
    col = tl.arange(0, P) - SHIFT  # so that rotary pairs start at an even place of the tile
    real = (col >= 0) & (col < D)
    if POOL:
        x = _pool8(rows, row_index + entry * index_stride, col, (live, real), stride, D)
    else:
        inside = live[:, None] & real[None, :]
        x = tl.load(rows + entry[:, None] * stride + col[None, :], mask=inside, other=0.0)
    x = x.to(dtype).to(tl.float32)
    w = tl.load(weight + col, mask=real, other=0.0).to(tl.float32)
    position = tl.load(positions + entry, mask=live, other=0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    x = (x * factor * w[None, :]).to(dtype).to(tl.float32)
    x = rotate_row_tail(x, position, inv_freq, (keep + SHIFT) // 2, PAIRS)
    x = x.to(dtype).to(tl.float32)
    if QUANT:
        if INDEX:
            x = hadamard_rows(x, sylvester(P), scale, NARROW).to(dtype).to(tl.float32)
            x = fake_fp4(x)
        elif FORMAT != FP8_LATENT:
            x = tl.where((col < keep)[None, :], fake_fp8(x, QUANT_BLOCK), x)
    if FORMAT == NO_PAGES:
        inside = live[:, None] & real[None, :]
        tl.store(out + entry[:, None] * D + col[None, :], x.to(dtype), mask=inside)
    else:
        slot = tl.load(slots + entry, mask=live, other=-1)
        here = slot >= 0
        page, offset = locate(slot, page_stride, N)
        start = page + offset * PAYLOAD
        if FORMAT == FP8_LATENT:
            if keep > 0:
                if QUANT:
                    codes, byte, _ = round_latent(x)
                else:
                    codes, byte, _ = encode_latent(x)
                put_codes(
                    pool, page, offset, here, codes, byte, keep, PAYLOAD, SCALE_OFFSET, SCALE_BYTES
                )
            put_plain(pool, start + keep, here, x, col - keep, D - keep, BF16_ROWS)
        elif FORMAT == FP8_INDEX:
            codes, inverse, _ = encode_index(x)
            put_index(
                pool, page, offset, here, codes, inverse, D, PAYLOAD, SCALE_OFFSET, SCALE_BYTES
            )
        else:
            put_plain(pool, start, here, x, col, D, FORMAT)


def make_entries(
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
    """Entries [E, d] of ``compress``; with ``pages`` (pool, layout, slots) stored instead, and none left."""
    count, dim, pairs = row_index.shape[0], norm_weight.shape[0], inv_freq.numel()
    left = count if pages is None else 0
    out = torch.empty((left, dim), dtype=dtype, device=rows.device)
    pool, layout, slots = pages if pages is not None else (None, None, None)
    if count == 0:
        return out
    pooling = ratio == 4
    if not pooling:
        pooled = torch.empty((count, dim), dtype=dtype, device=rows.device)
        _pool_wide[(count, triton.cdiv(dim, _CHANNELS))](
            rows, row_index, pooled, rows.stride(0), row_index.stride(0),
            D=dim, CHANNELS=_CHANNELS, SLOTS=ratio, num_warps=_WIDE_WARPS,
        )  # fmt: skip
        rows = pooled
    shift = dim & 1
    width = padded(dim + shift, QUANT_BLOCK.value)
    if index and quantize:
        block, warps = _INDEX_ENTRIES, _INDEX_WARPS
    elif pooling:
        block, warps = 1, max(1, width // _MAIN_COLUMNS)
    else:
        block, warps = _POOLED_ENTRIES, _POOLED_ENTRIES
    _entries[(triton.cdiv(count, block),)](
        rows, row_index, norm_weight, positions, inv_freq, out, pool, slots,
        rows.stride(0), row_index.stride(0), 0 if pool is None else pool.stride(0),
        eps, float(dim) ** -0.5, count,
        D=dim, P=dim if index and quantize else width, PAIRS=pairs, SHIFT=shift, BE=block,
        POOL=pooling, INDEX=index, QUANT=quantize and (index or dim > 2 * pairs),
        NARROW=dtype is torch.bfloat16, **page_constants(layout), num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@twin_for_float64(reference.compress)
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
    return make_entries(
        rows, row_index, norm_weight, positions, inv_freq, eps,
        ratio=ratio, index=index, quantize=quantize, dtype=dtype, pages=None,
    )  # fmt: skip
