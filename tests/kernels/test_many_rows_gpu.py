"""More rows than a grid of 65,535, and more elements than int32 counts, for ops that fill pages.

The invariance tests do this for the others; pages of so many entries need slots of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kernels
from kernels import CacheDtype, CompressPart, EntryKind, PageLayout
from tests.kernels.op_cases import base
from tests.kernels.op_cases.base import BF16, EPS, own_kernels

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SMALL = 1000  # rows that come again and again
CHUNK = 100 * SMALL
LATENT = base.layout(EntryKind.LATENT, CacheDtype.FP8, 64, 512, 64)
INDEX = base.layout(EntryKind.INDEX, CacheDtype.FP8, 64, 128, 0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with own_kernels():
        yield
    torch.cuda.empty_cache()


def rows_for(width: int) -> int:
    """Rows of ``width`` values that int32 cannot address, at least 70,000."""
    return max((1 << 31) // width + SMALL, 70_000)


def again(x: Tensor, count: int) -> Tensor:
    return x[torch.arange(count, device=CUDA) % SMALL]


def same(got: Tensor, small: Tensor) -> None:
    """Every row has the bits that it has in the small batch."""
    for part in got.split(CHUNK):
        want = again(small, part.shape[0])
        assert torch.equal(part.nan_to_num(), want.nan_to_num())


def pages(layout: PageLayout, count: int) -> tuple[Tensor, Tensor]:
    """Room for ``count`` entries, last entry first."""
    pool = base.empty_pool(CUDA, layout, -(-count // layout.entries_per_page))
    return pool, torch.arange(count - 1, -1, -1, device=CUDA)


def stored(pool: Tensor, layout: PageLayout, slots: Tensor, small: Tensor) -> None:
    for part in slots.split(CHUNK):
        same(kernels.load_entries(pool, layout, part, torch.float32), small)


@pytest.mark.parametrize("insert", [False, True])
def test_latents(insert: bool) -> None:
    count = rows_for(512)
    freq, weight = base.frequencies(CUDA), base.norm_weight(CUDA, 512)
    at, kv = base.positions(CUDA, SMALL), base.normal(CUDA, SMALL, 512, dtype=BF16)
    found = []
    for number in (SMALL, count):
        pool, slots = pages(LATENT, number)
        rows, positions = again(kv, number), again(at, number)
        out = rows
        if insert:
            out = kernels.kv_insert(
                rows, weight, positions, freq, EPS, pool, LATENT, slots, quantize=True
            )
        else:
            kernels.store_entries(pool, LATENT, slots, rows)
        found.append((out, pool, slots))
    (few, small_pool, few_slots), (many, pool, slots) = found
    same(many, few)
    stored(pool, LATENT, slots, kernels.load_entries(small_pool, LATENT, few_slots, torch.float32))


def test_queries_and_latents() -> None:
    count = rows_for(64 * 512)
    freq, weight = base.frequencies(CUDA), base.norm_weight(CUDA, 512)
    at, kv = base.positions(CUDA, SMALL), base.normal(CUDA, SMALL, 512, dtype=BF16)
    q = base.normal(CUDA, SMALL, 64, 512, dtype=BF16)
    index = base.normal(CUDA, SMALL, 64, 128, dtype=BF16)
    found = []
    for number in (SMALL, count):
        pool, slots = pages(LATENT, number)
        made = kernels.qkv_norm_rope(
            again(q, number),
            again(kv, number),
            weight,
            again(at, number),
            freq,
            EPS,
            pool,
            LATENT,
            slots,
            quantize=True,
            index_q=again(index, number),
        )
        found.append((made, pool, slots))
    (few, small_pool, few_slots), (many, pool, slots) = found
    for small, large in zip(few, many, strict=True):
        assert small is not None
        assert large is not None
        same(large, small)
    stored(pool, LATENT, slots, kernels.load_entries(small_pool, LATENT, few_slots, torch.float32))


@pytest.mark.parametrize("layout", [LATENT, INDEX], ids=["csa", "indexer"])
def test_entries_of_a_chunk(layout: PageLayout) -> None:
    """Entries pool rows from all over a tensor of more than 2^31 values."""
    dim = layout.head_dim
    tokens = rows_for(4 * dim)
    rows = again(base.normal(CUDA, SMALL, 4 * dim), tokens)
    index = torch.randint(0, SMALL, (SMALL, 8), device=CUDA)
    far = tokens // SMALL - 1
    freq, weight = base.frequencies(CUDA), base.norm_weight(CUDA, dim)
    at = base.positions(CUDA, SMALL)
    found = []
    for number in (SMALL, 80_000):
        picked = again(index, number)
        if number > SMALL:
            picked = picked + SMALL * torch.randint(0, far, picked.shape, device=CUDA)
        pool, slots = pages(layout, number)
        kernels.compress_insert(
            rows,
            picked,
            weight,
            again(at, number),
            freq,
            EPS,
            pool,
            layout,
            slots,
            ratio=4,
            quantize=True,
            dtype=BF16,
        )
        found.append((pool, slots))
    (small_pool, few_slots), (pool, slots) = found
    stored(pool, layout, slots, kernels.load_entries(small_pool, layout, few_slots, torch.float32))


def test_entries_of_a_decode_step() -> None:
    """70,000 sequences, whose rings have more than 2^31 values together."""
    ring, count, width = 12, 72_000, 4 * (512 + 128)
    assert ring * count * width > 1 << 31
    kept = base.normal(CUDA, SMALL * ring, width).view(SMALL, ring, width)
    rows, ape = base.normal(CUDA, SMALL, width), torch.randn(4, width // 2, device=CUDA)
    at = torch.randint(2, 1 << 16, (SMALL,), device=CUDA) * 4 + 3
    weights = [base.norm_weight(CUDA, dim) for dim in (512, 128)]
    freq, found = base.frequencies(CUDA), []
    for number in (SMALL, count):
        state = again(kept, number).view(number * ring, width)
        pools = [pages(layout, number)[0] for layout in (LATENT, INDEX)]
        slots = torch.arange(number - 1, -1, -1, device=CUDA)
        apes = (ape[:, :1024].contiguous(), ape[:, 1024:].contiguous())
        parts = tuple(
            CompressPart(ape=a, norm_weight=w, pool=pool, layout=layout, slots=slots)
            for a, w, pool, layout in zip(apes, weights, pools, (LATENT, INDEX), strict=True)
        )
        kernels.compress_decode(
            again(rows, number),
            state,
            parts,
            again(at, number),
            torch.arange(number, device=CUDA),
            torch.arange(number, device=CUDA) * ring,
            ratio=4,
            ring_rows=ring,
            inv_freq=freq,
            eps=EPS,
            quantize=True,
            dtype=BF16,
        )
        found.append((state.view(number, ring, width), pools, slots))
    (small_state, small_pools, few_slots), (state, pools, slots) = found
    for part in state.split(2 * SMALL):
        assert torch.equal(part, again(small_state, part.shape[0]))
    for layout, small_pool, pool in zip((LATENT, INDEX), small_pools, pools, strict=True):
        few = kernels.load_entries(small_pool, layout, few_slots, torch.float32)
        stored(pool, layout, slots, few)


def test_quantised_output_projection() -> None:
    count = rows_for(64 * 512)
    weight = base.fp8_weight(CUDA, 8 * 1024, 8 * 512)
    wo_a = kernels.prepare_weight(weight, dequantize=True)
    o = base.normal(CUDA, SMALL, 64, 512, dtype=BF16)
    at, freq = base.positions(CUDA, SMALL), base.frequencies(CUDA)
    few, many = (
        kernels.grouped_output_quant(again(o, number), again(at, number), freq, wo_a, 8)
        for number in (SMALL, count)
    )
    same(many.q.view(torch.uint8), few.q.view(torch.uint8))
    same(many.scale, few.scale)
