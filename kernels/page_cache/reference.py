"""Torch twins of the paged cache ops, and the loads that attention and the indexer share."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.page_layout import QUANT_BLOCK, CacheDtype, EntryKind, PageLayout
from kernels.quant.reference import act_quant, e4m3_values, to_e4m3

_E4M3_MAX = 448.0
_F32_BIAS = 127
_F32_MANTISSA_BITS = 23
_PLAIN = {CacheDtype.FP32: torch.float32, CacheDtype.BF16: torch.bfloat16}


def store_entries(pool: Tensor, layout: PageLayout, slots: Tensor, rows: Tensor) -> None:
    """See ``kernels.page_cache.api.store_entries``."""
    keep = slots >= 0
    if not bool(keep.all()):
        slots, rows = slots[keep], rows[keep]
    if slots.numel() == 0:
        return
    page, offset = _locate(pool, layout, slots)
    payload, scales = _encode(rows, layout)
    payload_view, scale_view = _entry_views(pool, layout)
    payload_view[page, offset] = payload
    if scales is not None:
        scale_view[..., : scales.shape[1]][page, offset] = scales


def load_entries(pool: Tensor, layout: PageLayout, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``kernels.page_cache.api.load_entries``."""
    missing = slots < 0
    if bool(missing.all()):
        return torch.zeros(slots.numel(), layout.head_dim, dtype=dtype, device=slots.device)
    page, offset = _locate(pool, layout, slots.clamp(min=0))
    payload_view, scale_view = _entry_views(pool, layout)
    rows = _decode(payload_view[page, offset], scale_view[page, offset], layout, dtype)
    # masked_fill, not a product: slot 0 may hold anything, NaN included.
    return rows.masked_fill_(missing[:, None], 0)


def round_entries(rows: Tensor, layout: PageLayout) -> Tensor:
    """See ``kernels.page_cache.api.round_entries``."""
    payload, scales = _encode(rows, layout)
    if scales is None:
        scales = payload[:, :0]
    decoded = _decode(payload, scales, layout, rows.dtype)
    return decoded.clone() if decoded.data_ptr() == rows.data_ptr() else decoded


def load_sequence(
    pool: Tensor, layout: PageLayout, blocks: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Entries 0..count-1 of one sequence, page by page.

    Args:
        pool: uint8 [P, page_bytes].
        layout: page layout.
        blocks: integer [B], the sequence's row of the block table; -1 = page not here.
        count: entries wanted.
        dtype: dtype of the rows.

    Returns:
        Rows [count, d] (zeros where the page is not here) and bool [count], True where it is.

    Raises:
        KernelContractError: ``count`` exceeds the blocks, or a page lies outside the pool.
    """
    per_page = layout.entries_per_page
    num_blocks = -(-count // per_page)
    if num_blocks > blocks.numel():
        raise KernelContractError(
            f"paged entries: {count} entries need {num_blocks} blocks of {per_page},"
            f" the block table holds {blocks.numel()}"
        )
    pages = blocks[:num_blocks].to(torch.int64)
    present = (pages >= 0).repeat_interleave(per_page)[:count]
    if count == 0 or not bool((pages >= 0).any()):
        return torch.zeros(count, layout.head_dim, dtype=dtype, device=pool.device), present
    _check_range("page", pages, pool.shape[0])
    raw = pool.index_select(0, pages.clamp(min=0))
    scale_stop = layout.scale_offset + per_page * layout.scale_bytes
    payload = raw[:, : layout.scale_offset].reshape(-1, layout.payload_bytes)[:count]
    scales = raw[:, layout.scale_offset : scale_stop]
    scales = scales.reshape(raw.shape[0] * per_page, layout.scale_bytes)[:count]
    rows = _decode(payload, scales, layout, dtype)
    if not bool(present.all()):
        rows = rows.masked_fill(~present[:, None], 0)
    return rows, present


def sequence_runs(row_seq: Tensor) -> list[tuple[int, int, int]]:
    """Maximal runs of equal sequence index as ``(sequence, start row, stop row)``."""
    if row_seq.numel() == 0:
        return []
    seqs, lengths = torch.unique_consecutive(row_seq, return_counts=True)
    runs, start = [], 0
    for seq, length in zip(seqs.tolist(), lengths.tolist(), strict=True):
        runs.append((seq, start, start + length))
        start += length
    return runs


def _locate(pool: Tensor, layout: PageLayout, slots: Tensor) -> tuple[Tensor, Tensor]:
    _check_range("slot", slots, pool.shape[0] * layout.entries_per_page)
    page = torch.div(slots, layout.entries_per_page, rounding_mode="floor")
    return page, slots - page * layout.entries_per_page


def _check_range(what: str, index: Tensor, size: int) -> None:
    """Bounds on the CPU only: on a GPU the read-back would stall the stream."""
    if index.device.type == "cpu" and index.numel() and int(index.max()) >= size:
        raise KernelContractError(
            f"page_cache: {what} {int(index.max())} is outside the pool, allowed: -1..{size - 1}"
        )


def _entry_views(pool: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Byte views [P, n, payload_bytes] and [P, n, scale_bytes] of the same memory."""
    pages, base = pool.shape[0], pool.storage_offset()
    per_page, stride = layout.entries_per_page, pool.stride(0)
    payload = pool.as_strided(
        (pages, per_page, layout.payload_bytes), (stride, layout.payload_bytes, 1), base
    )
    scales = pool.as_strided(
        (pages, per_page, layout.scale_bytes),
        (stride, layout.scale_bytes, 1),
        base + layout.scale_offset,
    )
    return payload, scales


def _encode(rows: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor | None]:
    """Payload bytes [N, payload_bytes] and the used scale bytes [N, <= scale_bytes]."""
    plain = _PLAIN.get(layout.dtype)
    if plain is not None:
        return rows.to(plain).contiguous().view(torch.uint8), None
    if layout.kind is EntryKind.INDEX:
        values = rows.to(torch.float32)
        scale = _ceil_pow2_scale(values.abs().amax(dim=-1, keepdim=True))
        return to_e4m3(values / scale).view(torch.uint8), scale.view(torch.uint8)
    nope = layout.nope_dim
    quantised, scale = act_quant(rows[:, :nope], QUANT_BLOCK)
    exponent = scale.contiguous().view(torch.int32) >> _F32_MANTISSA_BITS
    rope = rows[:, nope:].to(torch.bfloat16).contiguous().view(torch.uint8)
    payload = torch.cat((quantised.view(torch.uint8), rope), dim=-1)
    return payload, exponent.to(torch.uint8)


def _ceil_pow2_scale(amax: Tensor) -> Tensor:
    """``2^ceil(log2(amax / 448))`` in f32, at least the smallest normal number; NaN for NaN and infinity."""
    floor = _E4M3_MAX * 2.0 ** (1 - _F32_BIAS)
    mantissa, exponent = torch.frexp(amax.clamp(min=floor) / _E4M3_MAX)
    # x = mantissa * 2^exponent with mantissa in [0.5, 1): only an exact power of two stays below.
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = ((exponent + _F32_BIAS) << _F32_MANTISSA_BITS).view(torch.float32)
    return scale.masked_fill(~amax.isfinite(), torch.nan)


def _decode(payload: Tensor, scales: Tensor, layout: PageLayout, dtype: torch.dtype) -> Tensor:
    """Rows [N, d] from payload bytes [N, payload_bytes] and scale bytes [N, scale_bytes]."""
    plain = _PLAIN.get(layout.dtype)
    if plain is not None:
        return payload.view(plain).to(dtype)
    if layout.kind is EntryKind.INDEX:
        return (e4m3_values(payload) * scales.contiguous().view(torch.float32)).to(dtype)
    count, nope = payload.shape[0], layout.nope_dim
    blocks = nope // QUANT_BLOCK
    scale = (scales[:, :blocks].to(torch.int32) << _F32_MANTISSA_BITS).view(torch.float32)
    values = e4m3_values(payload[:, :nope]).view(count, blocks, QUANT_BLOCK) * scale[..., None]
    rope = payload[:, nope:].contiguous().view(torch.bfloat16)
    return torch.cat((values.view(count, nope).to(dtype), rope.to(dtype)), dim=-1)
