"""``compress_decode`` on the GPU: the twin's state, and the bits of ``compress_insert``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import CacheDtype, CompressPart, EntryKind, PageLayout
from kernels.compress_decode import reference
from kernels.page_cache.reference import load_entries
from tests.helpers.gpu import DEVICE, Implementation, assert_near, there
from tests.helpers.strided import column_slice
from tests.kernels.oracle64 import frequencies

pytestmark = pytest.mark.gpu
impl = Implementation("kernels.compress_decode.cuda_impl")
insert = Implementation("kernels.compress_insert.cuda_impl")
EPS = 1e-6


def parts_of(
    ratio: int, dims: tuple[int, int], cache: CacheDtype, slots: Tensor
) -> tuple[CompressPart, ...]:
    made = []
    kinds = [(EntryKind.LATENT, dims[0], 64), (EntryKind.INDEX, dims[1], 0)]
    for kind, dim, rope in kinds[: 2 if ratio == 4 else 1]:
        pages = PageLayout(kind=kind, dtype=cache, head_dim=dim, rope_dim=rope, entries_per_page=3)
        pool = torch.full((100, pages.page_bytes), 7, dtype=torch.uint8, device=DEVICE)
        ape = torch.randn(ratio, dim * (2 if ratio == 4 else 1), device=DEVICE)
        weight = torch.randn(dim, device=DEVICE)
        made.append(CompressPart(ape=ape, norm_weight=weight, pool=pool, layout=pages, slots=slots))
    return tuple(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(("dims", "offset"), [((512, 128), 8), ((128, 64), 3)])
def test_steps(
    dims: tuple[int, int], offset: int, ratio: int, cache: CacheDtype, dtype: torch.dtype
) -> None:
    """Three sequences; groups that end at the first, a middle and the last row, a start at 0, many rows."""
    ring, series = (16, 2) if ratio == 4 else (256, 1)
    firsts, counts, width = [0, 5 * ratio - 2, 9 * ratio - 1], [4, 4, 3], 9
    counts[0] = 9 if ratio == 4 else 4
    none = torch.tensor([], dtype=torch.int64)
    positions, seq, base = none, none, none
    for s, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        real = torch.arange(width) < count
        at = torch.where(real, first + torch.arange(width), 0)
        positions, seq = torch.cat([positions, at]), torch.cat([seq, torch.full((width,), s)])
        base = torch.cat([base, torch.where(real, (s + 1) * ring, -1)])
    positions, seq, base = there((positions, seq, base))
    count = positions.shape[0]
    ends = (base >= 0) & ((positions + 1) % ratio == 0)
    slots = torch.randperm(300, device=DEVICE)[:count]
    parts = parts_of(ratio, dims, cache, slots)
    total = sum(p.width for p in parts)
    rows = there(column_slice(torch.randn(count, total), offset))
    rows = torch.where((base >= 0)[:, None], rows, float("nan"))
    state = torch.randn(5 * ring, total, device=DEVICE)
    state[: 2 * ring] = float("nan")  # what the first sequence has not written yet
    kwargs: dict[str, Any] = {
        "ratio": ratio,
        "ring_rows": ring,
        "inv_freq": there(frequencies(64)),
        "eps": EPS,
        "quantize": True,
        "dtype": dtype,
    }
    twin = tuple(replace(p, pool=p.pool.clone()) for p in parts)
    joined = tuple(p.pool.clone() for p in parts)
    want_state = state.clone()
    reference.compress_decode(rows, want_state, twin, positions, seq, base, **kwargs)
    impl.compress_decode(rows, state, parts, positions, seq, base, **kwargs)
    assert torch.equal(state.nan_to_num(), want_state.nan_to_num())
    back, column = series * ratio, 0
    end = positions[ends] + 1
    pooled = end[:, None] - back + torch.arange(back, device=DEVICE)
    index = (base[ends][:, None] + pooled % ring).masked_fill(pooled < 0, -1)
    for part, other, pool in zip(parts, twin, joined, strict=True):
        insert.compress_insert(
            state[:, column : column + part.width],
            index,
            part.norm_weight,
            end - ratio,
            kwargs["inv_freq"],
            EPS,
            pool,
            part.layout,
            slots[ends],
            ratio=ratio,
            quantize=True,
            dtype=dtype,
        )
        assert torch.equal(part.pool, pool)
        got = load_entries(part.pool, part.layout, slots[ends], dtype)
        want = load_entries(other.pool, part.layout, slots[ends], dtype)
        assert got.shape[0] >= 2
        assert_near(got, want, bound=2e-2)
        column += part.width
    # One sequence at a time, and rows that are not stored: the same bytes.
    for part, pool in zip(parts, joined, strict=True):
        pool[:] = part.pool
        part.pool[:] = 7
    for s in range(3):
        own = slice(s * width, s * width + counts[s])
        few = tuple(replace(p, slots=p.slots[own]) for p in parts)
        impl.compress_decode(rows[own], state, few, positions[own], seq[own], base[own], **kwargs)
        hidden = tuple(replace(p, slots=torch.full_like(p.slots, -1)) for p in few)
        impl.compress_decode(
            rows[own], state, hidden, positions[own], seq[own], base[own], **kwargs
        )
    assert torch.equal(state.nan_to_num(), want_state.nan_to_num())
    assert all(torch.equal(p.pool, pool) for p, pool in zip(parts, joined, strict=True))


def test_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    parts = parts_of(4, (512, 128), CacheDtype.FP8, none)
    total = sum(p.width for p in parts)
    impl.compress_decode(
        torch.empty(0, total, device=DEVICE),
        torch.zeros(16, total, device=DEVICE),
        parts,
        none,
        none,
        none,
        ratio=4,
        ring_rows=16,
        inv_freq=there(frequencies(64)),
        eps=EPS,
        quantize=True,
        dtype=torch.bfloat16,
    )
    assert all(bool((p.pool == 7).all()) for p in parts)
