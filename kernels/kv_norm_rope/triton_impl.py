"""The KV latent in one pass: norm, RoPE, FP8 rounding and, for ``kv_insert``, the page write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_norm_rope import reference
from kernels.page_cache.triton_pages import (
    BF16_ROWS,
    FP8_LATENT,
    NO_PAGES,
    encode_latent,
    locate,
    page_constants,
    put_codes,
    put_plain,
    round_latent,
)
from kernels.page_layout import PageLayout
from kernels.triton_math import QUANT_BLOCK, fake_fp8, padded, sincos, twin_for_float64

_ROWS, _WARPS = 2, 1  # tokens and warps of a program; a row lies in one warp


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions", "slots"])
def _latent(
    kv, weight, positions, inv_freq, out, pool, slots, stride, page_stride, eps, T,
    D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, PP: tl.constexpr, R: tl.constexpr,
    QUANT: tl.constexpr, FORMAT: tl.constexpr, N: tl.constexpr, PAYLOAD: tl.constexpr,
    SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    keep: tl.constexpr = D - 2 * PAIRS
    dtype = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < T
    col = tl.arange(0, P)
    tail = tl.arange(0, 2 * PP)
    pair = tl.arange(0, PP)
    source = kv + row[:, None] * stride
    inside = live[:, None] & (col < D)[None, :]
    in_tail = live[:, None] & (tail < 2 * PAIRS)[None, :]
    x = tl.load(source + col[None, :], mask=inside, other=0.0).to(tl.float32)
    end = tl.load(source + (keep + tail)[None, :], mask=in_tail, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    w_end = tl.load(weight + keep + tail, mask=tail < 2 * PAIRS, other=0.0).to(tl.float32)
    freq = tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0)
    position = tl.load(positions + row, mask=live, other=0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]

    x = (x * factor * w[None, :]).to(dtype).to(tl.float32)
    if QUANT and FORMAT != FP8_LATENT:
        x = fake_fp8(x, QUANT_BLOCK)
    end = (end * factor * w_end[None, :]).to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(end, (R, PP, 2)))
    sin, cos = sincos(position[:, None] * freq[None, :])
    first = even * cos - odd * sin
    second = even * sin + odd * cos
    end = tl.reshape(tl.join(first, second), (R, 2 * PP)).to(dtype).to(tl.float32)

    if FORMAT != NO_PAGES:
        slot = tl.load(slots + row, mask=live, other=-1)
        here = slot >= 0
        page, offset = locate(slot, page_stride, N)
        start = page + offset * PAYLOAD
        if FORMAT == FP8_LATENT:
            if keep > 0:
                if QUANT:
                    codes, byte, x = round_latent(x)
                else:
                    codes, byte, x = encode_latent(x)
                put_codes(
                    pool, page, offset, here, codes, byte, keep, PAYLOAD, SCALE_OFFSET, SCALE_BYTES
                )
            put_plain(pool, start + keep, here, end, tail, 2 * PAIRS, BF16_ROWS)
            end = end.to(tl.bfloat16).to(tl.float32)
        else:
            put_plain(pool, start, here, x, col, keep, FORMAT)
            element: tl.constexpr = PAYLOAD // D
            put_plain(pool, start + keep * element, here, end, tail, 2 * PAIRS, FORMAT)
            if FORMAT == BF16_ROWS:
                x = x.to(tl.bfloat16).to(tl.float32)
                end = end.to(tl.bfloat16).to(tl.float32)
    target = out + row[:, None] * D
    kept = live[:, None] & (col < keep)[None, :]
    tl.store(target + col[None, :], x.to(dtype), mask=kept)
    tl.store(target + (keep + tail)[None, :], end.to(dtype), mask=in_tail)


def latent_rows(
    kv: Tensor,
    weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    *,
    quantize: bool,
    pages: tuple[Tensor, PageLayout, Tensor] | None,
) -> Tensor:
    """Latents [T, d] of ``kv_norm_rope``; with ``pages`` (pool, layout, slots) of ``kv_insert``."""
    tokens, dim = kv.shape
    out = torch.empty((tokens, dim), dtype=kv.dtype, device=kv.device)
    if tokens == 0:
        return out
    pool, layout, slots = pages if pages is not None else (None, None, None)
    pairs = inv_freq.numel()
    _latent[(triton.cdiv(tokens, _ROWS),)](
        kv, weight, positions, inv_freq, out, pool, slots, kv.stride(0),
        0 if pool is None else pool.stride(0), eps, tokens,
        D=dim, P=padded(dim, QUANT_BLOCK.value), PAIRS=pairs, PP=padded(pairs), R=_ROWS,
        QUANT=quantize and dim > 2 * pairs, **page_constants(layout), num_warps=_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@twin_for_float64(reference.kv_norm_rope)
def kv_norm_rope(
    kv: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, *, quantize: bool
) -> Tensor:
    """See ``kernels.kv_norm_rope.api.kv_norm_rope``."""
    return latent_rows(kv, weight, positions, inv_freq, eps, quantize=quantize, pages=None)
