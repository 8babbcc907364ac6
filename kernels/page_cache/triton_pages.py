"""Device functions that write and read entries of a page; the byte layout is ``PageLayout``'s."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernels.page_layout import CacheDtype, EntryKind, PageLayout
from kernels.triton_math import (
    QUANT_BLOCK,
    fp8_scale_byte,
    index_scale_byte,
    largest_bits,
    on_fp8_grid,
    scale_inverse,
    scale_value,
)

# How a kernel names a page's format.
NO_PAGES = tl.constexpr(0)
FP8_LATENT = tl.constexpr(1)
FP8_INDEX = tl.constexpr(2)
BF16_ROWS = tl.constexpr(3)
FP32_ROWS = tl.constexpr(4)


def page_constants(layout: PageLayout | None) -> dict[str, Any]:
    """The compile-time constants of a layout, by kernel parameter; None: no pages."""
    if layout is None:
        return {"FORMAT": 0, "N": 1, "PAYLOAD": 1, "SCALE_OFFSET": 0, "SCALE_BYTES": 0}
    if layout.dtype is CacheDtype.FP8:
        form = FP8_INDEX if layout.kind is EntryKind.INDEX else FP8_LATENT
    else:
        form = BF16_ROWS if layout.dtype is CacheDtype.BF16 else FP32_ROWS
    return {
        "FORMAT": form.value,
        "N": layout.entries_per_page,
        "PAYLOAD": layout.payload_bytes,
        "SCALE_OFFSET": layout.scale_offset,
        "SCALE_BYTES": layout.scale_bytes,
    }


@triton.jit
def locate(slot, page_stride, N: tl.constexpr):
    """Byte offset of the page and number in the page of slots [rows] int64; -1 gives slot 0."""
    slot = tl.maximum(slot, 0)
    page = slot // N
    return page * page_stride, slot - page * N


@triton.jit
def put_plain(pool, start, here, x, col, D: tl.constexpr, FORMAT: tl.constexpr):
    """Write columns ``col`` of rows ``x`` [rows, W] as bf16 or f32 from byte ``start`` [rows] on."""
    if FORMAT == FP32_ROWS:
        target = pool.to(tl.pointer_type(tl.float32), bitcast=True) + (start // 4)[:, None]
    else:
        target = pool.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (start // 2)[:, None]
    inside = here[:, None] & ((col >= 0) & (col < D))[None, :]
    tl.store(target + col[None, :], x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def encode_latent(x):
    """Codes [rows, P] e4m3, scale bytes [rows, P / 64] int32 and values [rows, P] f32 of rows."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (rows, width // QUANT_BLOCK, QUANT_BLOCK))
    byte = fp8_scale_byte(largest_bits(blocks, 2))
    codes = (blocks * scale_inverse(byte)[:, :, None]).to(tl.float8e4nv)
    values = on_fp8_grid(blocks, byte[:, :, None])
    return tl.reshape(codes, (rows, width)), byte, tl.reshape(values, (rows, width))


@triton.jit
def round_latent(x):
    """``encode_latent`` of rows that take the official FP8 rounding first; its values are theirs."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (rows, width // QUANT_BLOCK, QUANT_BLOCK))
    peak = largest_bits(blocks, 2)
    byte = fp8_scale_byte(peak)
    values = on_fp8_grid(blocks, byte[:, :, None])
    # Rounding keeps order, so the largest value becomes the largest of the rounded ones.
    peak = on_fp8_grid(peak.to(tl.float32, bitcast=True), byte).to(tl.int32, bitcast=True)
    byte = fp8_scale_byte(peak)
    codes = (values * scale_inverse(byte)[:, :, None]).to(tl.float8e4nv)
    return tl.reshape(codes, (rows, width)), byte, tl.reshape(values, (rows, width))


@triton.jit
def encode_index(x):
    """Codes [rows, P] e4m3, scales [rows] f32 and values [rows, P] f32 of index entries."""
    byte = index_scale_byte(largest_bits(x, 1))
    codes = (x * scale_inverse(byte)[:, None]).to(tl.float8e4nv)
    scale = scale_value(byte)
    return codes, scale, codes.to(tl.float32) * scale[:, None]


@triton.jit
def put_codes(
    pool, page, offset, here, codes, byte,
    NOPE: tl.constexpr, PAYLOAD: tl.constexpr, SCALE_OFFSET: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    """Write the e4m3 part of fp8 latents: codes [rows, P] and scale bytes [rows, P / 64]."""
    col = tl.arange(0, codes.shape[1])
    block = tl.arange(0, byte.shape[1])
    start = (page + offset * PAYLOAD)[:, None]
    mask = here[:, None] & (col < NOPE)[None, :]
    tl.store(pool + start + col[None, :], codes.to(tl.uint8, bitcast=True), mask=mask)
    start = (page + SCALE_OFFSET + offset * SCALE_BYTES)[:, None]
    mask = here[:, None] & (block < NOPE // QUANT_BLOCK)[None, :]
    tl.store(pool + start + block[None, :], byte.to(tl.uint8), mask=mask)


@triton.jit
def put_index(
    pool, page, offset, here, codes, scale,
    D: tl.constexpr, PAYLOAD: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    """Write fp8 index entries: codes [rows, P] and one f32 scale each."""
    col = tl.arange(0, codes.shape[1])
    start = (page + offset * PAYLOAD)[:, None]
    mask = here[:, None] & (col < D)[None, :]
    tl.store(pool + start + col[None, :], codes.to(tl.uint8, bitcast=True), mask=mask)
    target = pool.to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(target + (page + SCALE_OFFSET + offset * SCALE_BYTES) // 4, scale, mask=here)
