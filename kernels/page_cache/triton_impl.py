"""Entries in paged pools: encode and store, load and decode, and the two without a pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.page_cache import reference
from kernels.page_cache.triton_pages import (
    BF16_ROWS,
    FP8_INDEX,
    FP8_LATENT,
    FP32_ROWS,
    encode_index,
    encode_latent,
    locate,
    page_constants,
    put_codes,
    put_index,
    put_plain,
)
from kernels.page_layout import PageLayout
from kernels.triton_math import QUANT_BLOCK, padded, scale_value, twin_for_float64

_ROWS, _WARPS = 8, 4  # entries and warps of a program; an entry lies in one warp


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["slots"])
def _store(
    pool, slots, rows, out, page_stride, row_stride, T,
    D: tl.constexpr, P: tl.constexpr, NOPE: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, PAYLOAD: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    TO_POOL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < T
    col = tl.arange(0, P)
    inside = live[:, None] & (col < D)[None, :]
    x = tl.load(rows + row[:, None] * row_stride + col[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    here = live
    page = row
    offset = row
    if TO_POOL:
        slot = tl.load(slots + row, mask=live, other=-1)
        here = slot >= 0
        page, offset = locate(slot, page_stride, N)
    start = page + offset * PAYLOAD
    if FORMAT == FP8_LATENT:
        value = x
        if NOPE > 0:
            codes, byte, value = encode_latent(x)
            if TO_POOL:
                put_codes(
                    pool, page, offset, here, codes, byte, NOPE, PAYLOAD, SCALE_OFFSET, SCALE_BYTES
                )
        if TO_POOL:
            put_plain(pool, start + NOPE, here, x, col - NOPE, D - NOPE, BF16_ROWS)
        value = tl.where((col < NOPE)[None, :], value, x.to(tl.bfloat16).to(tl.float32))
    elif FORMAT == FP8_INDEX:
        codes, scale, value = encode_index(x)
        if TO_POOL:
            put_index(pool, page, offset, here, codes, scale, D, PAYLOAD, SCALE_OFFSET, SCALE_BYTES)
    else:
        value = x
        if FORMAT == BF16_ROWS:
            value = x.to(tl.bfloat16).to(tl.float32)
        if TO_POOL:
            put_plain(pool, start, here, x, col, D, FORMAT)
    if not TO_POOL:
        tl.store(out + row[:, None] * D + col[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["slots"])
def _load(
    pool, slots, out, page_stride, T,
    D: tl.constexpr, P: tl.constexpr, NOPE: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, PAYLOAD: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < T
    slot = tl.load(slots + row, mask=live, other=-1)
    here = slot >= 0
    page, offset = locate(slot, page_stride, N)
    start = page + offset * PAYLOAD
    col = tl.arange(0, P)
    inside = live[:, None] & (col < D)[None, :]
    target = out + row[:, None] * D + col[None, :]
    if FORMAT == FP8_LATENT:
        wide = pool.to(tl.pointer_type(tl.bfloat16), bitcast=True) + ((start + NOPE) // 2)[:, None]
        mask = here[:, None] & ((col >= NOPE) & (col < D))[None, :]
        value = tl.load(wide + (col - NOPE)[None, :], mask=mask, other=0.0).to(tl.float32)
        if NOPE > 0:
            mask = here[:, None] & (col < NOPE)[None, :]
            codes = tl.load(pool + start[:, None] + col[None, :], mask=mask, other=0)
            block = tl.arange(0, P // QUANT_BLOCK)
            byte = tl.load(
                pool + (page + SCALE_OFFSET + offset * SCALE_BYTES)[:, None] + block[None, :],
                mask=here[:, None] & (block < NOPE // QUANT_BLOCK)[None, :],
                other=127,
            )
            scale = scale_value(byte.to(tl.int32))[:, :, None]
            codes = tl.reshape(codes, (R, P // QUANT_BLOCK, QUANT_BLOCK))
            narrow = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
            value = tl.where((col < NOPE)[None, :], tl.reshape(narrow, (R, P)), value)
    elif FORMAT == FP8_INDEX:
        mask = here[:, None] & (col < D)[None, :]
        codes = tl.load(pool + start[:, None] + col[None, :], mask=mask, other=0)
        scales = pool.to(tl.pointer_type(tl.float32), bitcast=True)
        scale = tl.load(
            scales + (page + SCALE_OFFSET + offset * SCALE_BYTES) // 4, mask=here, other=0.0
        )
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]
    else:
        if FORMAT == FP32_ROWS:
            source = pool.to(tl.pointer_type(tl.float32), bitcast=True) + (start // 4)[:, None]
        else:
            source = pool.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (start // 2)[:, None]
        mask = here[:, None] & (col < D)[None, :]
        value = tl.load(source + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def _shape(layout: PageLayout) -> dict[str, int]:
    return {
        "D": layout.head_dim,
        "P": padded(layout.head_dim, QUANT_BLOCK.value),
        "NOPE": layout.nope_dim,
        "R": _ROWS,
    }


@twin_for_float64(reference.store_entries)
def store_entries(pool: Tensor, layout: PageLayout, slots: Tensor, rows: Tensor) -> None:
    """See ``kernels.page_cache.api.store_entries``."""
    count = rows.shape[0]
    if count:
        _store[(triton.cdiv(count, _ROWS),)](
            pool, slots, rows, None, pool.stride(0), rows.stride(0), count,
            **_shape(layout), **page_constants(layout), TO_POOL=True, num_warps=_WARPS,
        )  # fmt: skip


@twin_for_float64(reference.round_entries)
def round_entries(rows: Tensor, layout: PageLayout) -> Tensor:
    """See ``kernels.page_cache.api.round_entries``."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    count = rows.shape[0]
    if count:
        _store[(triton.cdiv(count, _ROWS),)](
            None, None, rows, out, 0, rows.stride(0), count,
            **_shape(layout), **page_constants(layout), TO_POOL=False, num_warps=_WARPS,
        )  # fmt: skip
    return out


@twin_for_float64(reference.load_entries)
def load_entries(pool: Tensor, layout: PageLayout, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``kernels.page_cache.api.load_entries``."""
    count = slots.shape[0]
    out = torch.empty((count, layout.head_dim), dtype=dtype, device=slots.device)
    if count:
        _load[(triton.cdiv(count, _ROWS),)](
            pool, slots, out, pool.stride(0), count,
            **_shape(layout), **page_constants(layout), num_warps=_WARPS,
        )  # fmt: skip
    return out
