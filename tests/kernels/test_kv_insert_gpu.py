"""Latents and cache pages on the GPU: kv_norm_rope, kv_insert and the entry ops."""

from __future__ import annotations

import pytest
import torch

from kernels import CacheDtype, EntryKind, PageLayout
from kernels.kv_insert import reference as insert_reference
from kernels.kv_norm_rope import reference as latent_reference
from kernels.page_cache import reference as page_reference
from tests.helpers.gpu import DEVICE, Implementation, assert_near, assert_rows_alone, bounds, there
from tests.helpers.strided import column_slice
from tests.kernels.oracle64 import frequencies

pytestmark = pytest.mark.gpu
KINDS = ["triton", "cuda"]  # cuda takes the model's dims, and Triton the others
INSERT = {k: Implementation(f"kernels.kv_insert.{k}_impl") for k in KINDS}
LATENT = {k: Implementation(f"kernels.kv_norm_rope.{k}_impl") for k in KINDS}
page = Implementation("kernels.page_cache.triton_impl")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def layout(dtype: CacheDtype, kind: EntryKind, dim: int, per_page: int) -> PageLayout:
    rope_dim = 0 if kind is EntryKind.INDEX else min(64, dim)
    return PageLayout(
        kind=kind, dtype=dtype, head_dim=dim, rope_dim=rope_dim, entries_per_page=per_page
    )


def pool_of(pages: PageLayout, count: int) -> torch.Tensor:
    """Random bytes, pages apart from each other, on the GPU."""
    wide = torch.randint(0, 256, (count, pages.page_bytes + 576), dtype=torch.uint8, device=DEVICE)
    return wide[:, : pages.page_bytes]


def slots_of(rows: int, total: int) -> torch.Tensor:
    slots = torch.randperm(total)[:rows]
    slots[1::5] = -1
    return slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "dim", "quantize"), [(9, 512, True), (6, 512, False), (3, 64, True), (5, 128, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_kv_norm_rope(kind: str, rows: int, dim: int, quantize: bool, dtype: torch.dtype) -> None:
    latent = LATENT[kind]
    kv = column_slice((torch.randn(rows, dim) * 3).to(dtype))
    args = (torch.randn(dim), torch.randint(0, 1 << 20, (rows,)), frequencies(64), EPS)
    want = latent_reference.kv_norm_rope(kv, *args, quantize=quantize)
    kv, args = there(kv), there(args)
    got = latent.kv_norm_rope(kv, *args, quantize=quantize)
    # An FP8 step is 2^-4: one value in a thousand on an edge gives a norm error of 2^-4 / 30.
    assert_near(got, want, **({"bound": 2e-3, "unequal": 0.6} if quantize else bounds(dtype)))

    def alone(at: slice) -> torch.Tensor:
        made: torch.Tensor = latent.kv_norm_rope(
            kv[at], args[0], args[1][at], *args[2:], quantize=quantize
        )
        return made

    assert_rows_alone(alone, got, list(range(rows)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize(
    ("rows", "dim", "quantize"), [(33, 512, True), (10, 512, False), (7, 128, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_kv_insert_is_the_three_ops(
    kind: str, rows: int, dim: int, quantize: bool, cache: CacheDtype, dtype: torch.dtype
) -> None:
    insert, latent = INSERT[kind], LATENT[kind]
    pages = layout(cache, EntryKind.LATENT, dim, 5)
    kv, weight, at, freq, slots = there(
        (
            column_slice((torch.randn(rows, dim) * 3).to(dtype)),
            torch.randn(dim),
            torch.randint(0, 1 << 20, (rows,)),
            frequencies(64),
            slots_of(rows, 12 * 5),
        )
    )
    pool = pool_of(pages, 12)
    want_pool = pool.clone()
    got = insert.kv_insert(kv, weight, at, freq, EPS, pool, pages, slots, quantize=quantize)
    made = latent.kv_norm_rope(kv, weight, at, freq, EPS, quantize=quantize)
    page_reference.store_entries(want_pool, pages, slots, made)
    assert torch.equal(pool, want_pool)
    assert torch.equal(got, page_reference.round_entries(made, pages))
    twin = insert_reference.kv_insert(
        kv, weight, at, freq, EPS, pool.clone(), pages, slots, quantize=quantize
    )
    assert_near(got, twin, bound=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize(
    ("kind", "dim"),
    [
        (EntryKind.LATENT, 512),
        (EntryKind.LATENT, 64),
        (EntryKind.INDEX, 128),
        (EntryKind.INDEX, 40),
    ],
)
def test_entries_have_the_twins_bytes(
    kind: EntryKind, dim: int, cache: CacheDtype, dtype: torch.dtype
) -> None:
    pages = layout(cache, kind, dim, 7)
    rows = torch.randn(41, dim) * torch.exp2(torch.randint(-30, 10, (41, 1)).float())
    rows[3] = 0
    rows[4, 0] = 448.0
    rows, slots = there((column_slice(rows.to(dtype)), slots_of(41, 9 * 7)))
    pool = pool_of(pages, 9)
    want_pool = pool.clone()
    page.store_entries(pool, pages, slots, rows)
    page_reference.store_entries(want_pool, pages, slots, rows)
    assert torch.equal(pool, want_pool)
    want = page_reference.load_entries(pool, pages, slots, dtype)
    assert torch.equal(page.load_entries(pool, pages, slots, dtype), want)
    rounded = page.round_entries(rows, pages)
    assert torch.equal(rounded, page_reference.round_entries(rows, pages))
    none = slots[:0]
    page.store_entries(pool, pages, none, rows[:0])
    assert page.load_entries(pool, pages, none, dtype).shape == (0, dim)
    assert torch.equal(pool, want_pool)
