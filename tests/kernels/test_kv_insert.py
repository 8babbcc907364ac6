"""``kv_insert`` is ``kv_norm_rope``, ``round_entries`` and ``store_entries``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import (
    CacheDtype,
    EntryKind,
    KernelContractError,
    PageLayout,
    kv_insert,
    kv_norm_rope,
    load_entries,
    round_entries,
    store_entries,
)
from tests.helpers.strided import column_slice, microseconds
from tests.kernels.oracle64 import frequencies

EPS = 1e-6


def layout(cache: CacheDtype, dim: int = 128, rope_dim: int = 64) -> PageLayout:
    return PageLayout(
        kind=EntryKind.LATENT, dtype=cache, head_dim=dim, rope_dim=rope_dim, entries_per_page=3
    )


def call(kv: torch.Tensor, pages: PageLayout, slots: torch.Tensor, **changes: Any) -> Any:
    args = {
        "kv": kv,
        "weight": torch.ones(pages.head_dim),
        "positions": torch.arange(kv.shape[0]),
        "inv_freq": frequencies(64),
        "eps": EPS,
        "pool": torch.full((4, pages.page_bytes), 7, dtype=torch.uint8),
        "layout": pages,
        "slots": slots,
        "quantize": True,
    } | changes
    return kv_insert(**args), args["pool"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize("quantize", [True, False])
def test_it_is_the_three_ops(quantize: bool, cache: CacheDtype, dtype: torch.dtype) -> None:
    pages = layout(cache)
    kv = column_slice((torch.randn(6, 128) * 3).to(dtype))
    weight, at = torch.randn(128), torch.randint(0, 1 << 20, (6,))
    slots = torch.tensor([7, -1, 0, 11, -1, 4])
    got, pool = call(kv, pages, slots, weight=weight, positions=at, quantize=quantize)
    made = kv_norm_rope(kv, weight, at, frequencies(64), EPS, quantize=quantize)
    rows = round_entries(made, pages)
    assert torch.equal(got, rows)
    kept = slots >= 0
    assert torch.equal(load_entries(pool, pages, slots[kept], dtype), rows[kept])
    want = torch.full_like(pool, 7)
    store_entries(want, pages, slots, made)
    assert torch.equal(pool, want)  # and no other byte changed


def test_no_rows() -> None:
    pages = layout(CacheDtype.FP8)
    got, pool = call(torch.randn(0, 128), pages, torch.empty(0, dtype=torch.int64))
    assert got.shape == (0, 128)
    assert bool((pool == 7).all())


def test_contract() -> None:
    pages, slots, kv = layout(CacheDtype.FP8), torch.tensor([0, 1]), torch.randn(2, 128)
    wide = layout(CacheDtype.BF16, dim=192)
    with pytest.raises(KernelContractError, match="head_dim 128, got 192"):
        call(kv, wide, slots, weight=torch.ones(128))
    with pytest.raises(KernelContractError, match="expected latent entries with 64 rotary dims"):
        call(kv, layout(CacheDtype.FP8, rope_dim=128), slots)
    with pytest.raises(KernelContractError, match="slots: expected shape"):
        call(kv, pages, slots[:1])
    with pytest.raises(KernelContractError, match="weight: expected shape"):
        call(kv, pages, slots, weight=torch.ones(64))
    with pytest.raises(KernelContractError, match="slot 12 is outside"):
        call(kv, pages, torch.tensor([0, 12]))


@pytest.mark.benchmark
def test_speed() -> None:
    pages, slots = layout(CacheDtype.FP8), torch.arange(12)
    print(
        f"kv_insert 12x128: {microseconds(lambda: call(torch.randn(12, 128), pages, slots)):.0f} us"
    )
