"""Stable counting sort of routed rows by local expert; integers only, so exact in any order.

Few choices: one launch, in which the programs of a token find its places among all choices and copy its
row. Many: counts per block of choices, a scan over the blocks, places, then the copies.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moe_permute import reference
from kernels.moe_permute.api import PermutedQuantRows, PermutedRows
from kernels.quant_rows.api import QuantRows, empty_quant_rows
from kernels.triton_math import padded, twin_for_float64

_BLOCK = 128  # choices of a program that places
FEW = 512  # choices up to which every program finds its places among all of them
_LEAST = 32  # choices that a program of them looks through at least
_SCAN, _BINS = 256, 8  # blocks a step of the scan adds up, experts of one of its programs
_COLUMNS = 2048


@triton.jit
def _experts(ids, block, COUNT, FIRST, E: tl.constexpr, BLOCK: tl.constexpr):
    """Local expert of each choice of a block; E where it lives elsewhere or past the end."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + at, mask=at < COUNT, other=-1) - FIRST
    here = (expert >= 0) & (expert < E) & (at < COUNT)
    return tl.where(here, expert, E).to(tl.int32)


@triton.jit(do_not_specialize=["COUNT"])
def _count(ids, counts, COUNT, FIRST, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    expert = _experts(ids, block, COUNT, FIRST, E, BLOCK)
    bin_ = tl.arange(0, EP)
    tl.store(counts + block * EP + bin_, tl.histogram(expert, EP))


@triton.jit(do_not_specialize=["BLOCKS"])
def _scan(counts, starts, totals, BLOCKS, EP: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr):
    """starts[block, e]: rows of expert e in the blocks before; totals[e]. BINS experts a program."""
    bin_ = tl.program_id(0) * BINS + tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)
    for first in range(0, BLOCKS, STEP):
        block = first + tl.arange(0, STEP)
        at = block[:, None] * EP + bin_[None, :]
        mask = (block < BLOCKS)[:, None]
        count = tl.load(counts + at, mask=mask, other=0)
        running = tl.cumsum(count, axis=0)
        tl.store(starts + at, running - count + before[None, :], mask=mask)
        before = before + tl.sum(count, axis=0)
    tl.store(totals + bin_, before)


@triton.jit(do_not_specialize=["COUNT"])
def _place(
    ids, starts, totals, offsets, place, COUNT, FIRST,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    bin_ = tl.arange(0, EP)
    expert = _experts(ids, block, COUNT, FIRST, E, BLOCK)
    before = tl.load(starts + block * EP + bin_)
    total = tl.where(bin_ < E, tl.load(totals + bin_), 0)
    start = tl.cumsum(total, axis=0) - total
    tl.store(offsets + bin_, start.to(tl.int64), mask=(bin_ <= E) & (block == 0))
    start = start + before
    first = tl.gather(start, expert, axis=0)
    at = tl.arange(0, BLOCK)
    same = (expert[:, None] == expert[None, :]) & (at[None, :] < at[:, None])
    rank = tl.sum(same.to(tl.int32), axis=1)
    where = tl.where(expert < E, first + rank, -1)
    target = block * BLOCK + at
    tl.store(place + target, where.to(tl.int64), mask=target < COUNT)


@triton.jit(do_not_specialize=["T", "COUNT"])
def _few(
    x, scale, ids, weights, offsets, place, rows, row_scale, row_weight,
    stride, scale_stride, out_stride, out_scale_stride, weight_stride, T, COUNT, FIRST,
    D: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """A token's places and copies; one program more makes the offsets. S scale bytes a row, or 0."""
    token = tl.program_id(0).to(tl.int64)
    expert = _experts(ids, 0, COUNT, FIRST, E, NP)
    if token == T:
        if tl.program_id(1) == 0:
            bin_ = tl.arange(0, EP)
            count = tl.histogram(expert, EP)
            start = tl.cumsum(count, axis=0) - count
            tl.store(offsets + bin_, start.to(tl.int64), mask=bin_ <= E)
    else:
        first = tl.program_id(1) == 0
        col = tl.program_id(1) * P + tl.arange(0, P)
        value = tl.load(x + token * stride + col, mask=col < D, other=0.0)
        if S > 0:
            byte = tl.arange(0, SP)
            scales = tl.load(scale + token * scale_stride + byte, mask=byte < S, other=0)
        at = tl.arange(0, NP)
        for choice in tl.static_range(K):
            me = (token * K + choice).to(tl.int32)
            mine = tl.load(ids + me) - FIRST
            here = (mine >= 0) & (mine < E)
            ahead = (expert < mine) | ((expert == mine) & (at < me))
            where = tl.where(here, tl.sum(ahead.to(tl.int32), axis=0), -1).to(tl.int64)
            tl.store(rows + where * out_stride + col, value, mask=(col < D) & here)
            if S > 0:
                target = row_scale + where * out_scale_stride + byte
                tl.store(target, scales, mask=(byte < S) & here & first)
            if first:
                tl.store(place + me, where)
                weight = tl.load(weights + token * weight_stride + choice)
                tl.store(row_weight + where, weight, mask=here)


@triton.jit
def _copy_rows(
    x, scale, weights, place, rows, row_scale, row_weight,
    stride, scale_stride, out_stride, out_scale_stride, weight_stride,
    D: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) == 0
    col = tl.program_id(1) * P + tl.arange(0, P)
    value = tl.load(x + token * stride + col, mask=col < D, other=0.0)
    if S > 0:
        byte = tl.arange(0, SP)
        scales = tl.load(scale + token * scale_stride + byte, mask=byte < S, other=0)
    for choice in tl.static_range(K):
        at = tl.load(place + token * K + choice)
        tl.store(rows + at * out_stride + col, value, mask=(col < D) & (at >= 0))
        if S > 0:
            target = row_scale + at * out_scale_stride + byte
            tl.store(target, scales, mask=(byte < S) & (at >= 0) & first)
        weight = tl.load(weights + token * weight_stride + choice)
        tl.store(row_weight + at, weight, mask=(at >= 0) & first)


@triton.jit
def _add_rows(
    rows, place, shared, out, stride, shared_stride,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * P + tl.arange(0, P)
    total = tl.zeros((P,), tl.float32)
    for choice in tl.static_range(K):
        at = tl.load(place + token * K + choice)
        value = tl.load(rows + at * stride + col, mask=(col < D) & (at >= 0), other=0.0)
        total = total + value.to(tl.float32)
    if SHARED:
        value = tl.load(shared + token * shared_stride + col, mask=col < D, other=0.0)
        total = total + value.to(tl.float32)
    tl.store(out + token * D + col, total.to(out.dtype.element_ty), mask=col < D)


@functools.cache
def _compile_few(
    device: int,
    dtypes: tuple[torch.dtype | None, ...],
    strides: tuple[int, ...],
    first_expert: int,
    shape: tuple[tuple[str, int], ...],
) -> None:
    """Compile ``_few`` for all numbers of choices: a later step of another number must not wait for it."""
    size = _LEAST
    while size <= FEW:
        _few.warmup(*dtypes, *strides, 1, 1, first_expert, NP=size, grid=(1,), **dict(shape))
        size *= 2


def _permute(
    x: Tensor,
    scale: Tensor | None,
    rows: Tensor,
    row_scale: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    first_expert: int,
    num_local: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``rows`` (and their scale bytes); returns offsets, row weights and places."""
    ids = ids.contiguous()
    tokens, choices = ids.shape
    count, dim = ids.numel(), x.shape[1]
    row_weight = torch.empty((count,), dtype=torch.float32, device=x.device)
    place = torch.empty((tokens, choices), dtype=torch.int64, device=x.device)
    if count == 0:
        offsets = torch.zeros((num_local + 1,), dtype=torch.int64, device=x.device)
        return offsets, row_weight, place
    offsets = torch.empty((num_local + 1,), dtype=torch.int64, device=x.device)
    blocks, bins = triton.cdiv(count, _BLOCK), padded(num_local + 1, 32)
    width = _COLUMNS if x.element_size() > 1 else 2 * _COLUMNS
    few = count <= FEW
    block = min(width // 2 if few else width, padded(dim, 32))
    scales = 0 if scale is None else scale.shape[1]
    strides = (
        x.stride(0),
        0 if scale is None else scale.stride(0),
        rows.stride(0),
        0 if row_scale is None else row_scale.stride(0),
        weights.stride(0),
    )
    warps = max(1, block * x.element_size() // 1024)
    if few:
        tensors = (x, scale, ids, weights, offsets, place, rows, row_scale, row_weight)
        shape = {
            **{"D": dim, "P": block, "S": scales, "SP": padded(scales), "K": choices},
            **{"E": num_local, "EP": bins, "num_warps": warps},
        }
        dtypes = tuple(None if t is None else t.dtype for t in tensors)
        _compile_few(x.get_device(), dtypes, strides, first_expert, tuple(shape.items()))
        _few[(tokens + 1, triton.cdiv(dim, block))](
            *tensors, *strides, tokens, count, first_expert, NP=padded(count, _LEAST), **shape
        )
        return offsets, row_weight, place
    counts = torch.empty((blocks, bins), dtype=torch.int32, device=x.device)
    starts = torch.empty_like(counts)
    _count[(blocks,)](
        ids, counts, count, first_expert, E=num_local, EP=bins, BLOCK=_BLOCK, num_warps=4
    )
    totals = torch.empty((bins,), dtype=torch.int32, device=x.device)
    _scan[(bins // _BINS,)](
        counts, starts, totals, blocks, EP=bins, BINS=_BINS, STEP=_SCAN, num_warps=4
    )
    _place[(blocks,)](
        ids, starts, totals, offsets, place, count, first_expert,
        E=num_local, EP=bins, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    _copy_rows[(tokens, triton.cdiv(dim, block))](
        x, scale, weights, place, rows, row_scale, row_weight, *strides,
        D=dim, P=block, S=scales, SP=padded(scales), K=choices, num_warps=warps,
    )  # fmt: skip
    return offsets, row_weight, place


@twin_for_float64(reference.moe_permute)
def moe_permute(
    x: Tensor, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedRows:
    """See ``kernels.moe_permute.api.moe_permute``."""
    rows = torch.empty((ids.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    offsets, row_weight, place = _permute(
        x, None, rows, None, ids, weights, first_expert, num_local
    )
    return PermutedRows(rows=rows, offsets=offsets, row_weight=row_weight, place=place)


def moe_permute_quant(
    rows: QuantRows, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedQuantRows:
    """See ``kernels.moe_permute.api.moe_permute_quant``."""
    out = empty_quant_rows(ids.numel(), rows.shape[1], rows.device)
    offsets, row_weight, place = _permute(
        rows.q.view(torch.uint8),
        rows.scale,
        out.q.view(torch.uint8),
        out.scale,
        ids,
        weights,
        first_expert,
        num_local,
    )
    return PermutedQuantRows(rows=out, offsets=offsets, row_weight=row_weight, place=place)


@twin_for_float64(reference.moe_unpermute)
def moe_unpermute(
    rows: Tensor, place: Tensor, shared: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See ``kernels.moe_permute.api.moe_unpermute``."""
    place = place.contiguous()
    tokens, choices = place.shape
    dim = rows.shape[1]
    out = torch.empty((tokens, dim), dtype=dtype, device=rows.device)
    if out.numel():
        block = min(_COLUMNS, padded(dim, 32))
        _add_rows[(tokens, triton.cdiv(dim, block))](
            rows, place, shared, out, rows.stride(0), 0 if shared is None else shared.stride(0),
            D=dim, P=block, K=choices, SHARED=shared is not None,
            num_warps=max(1, block // 512),
        )  # fmt: skip
    return out
