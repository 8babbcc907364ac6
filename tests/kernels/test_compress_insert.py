"""``compress_insert`` is ``compress`` and ``store_entries``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import (
    CacheDtype,
    EntryKind,
    KernelContractError,
    PageLayout,
    compress,
    compress_insert,
    store_entries,
)
from tests.helpers.strided import microseconds
from tests.kernels.oracle64 import frequencies


def layout(cache: CacheDtype, index: bool) -> PageLayout:
    return PageLayout(
        kind=EntryKind.INDEX if index else EntryKind.LATENT,
        dtype=cache,
        head_dim=128,
        rope_dim=0 if index else 64,
        entries_per_page=3,
    )


def arguments(ratio: int, pages: PageLayout) -> dict[str, Any]:
    series = 2 if ratio == 4 else 1
    index = torch.randint(0, 200, (5, series * ratio))
    index[0, :3] = -1
    return {
        "rows": torch.randn(200, 2 * series * 128),
        "row_index": index,
        "norm_weight": torch.randn(128),
        "positions": torch.randint(0, 1 << 20, (5,)),
        "inv_freq": frequencies(64),
        "eps": 1e-6,
        "pool": torch.full((4, pages.page_bytes), 7, dtype=torch.uint8),
        "layout": pages,
        "slots": torch.tensor([7, -1, 0, 11, 4]),
        "ratio": ratio,
        "quantize": True,
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("ratio", [4, 128])
def test_it_is_the_two_ops(ratio: int, index: bool, cache: CacheDtype, dtype: torch.dtype) -> None:
    pages = layout(cache, index)
    args = arguments(ratio, pages) | {"dtype": dtype}
    compress_insert(**args)
    pool, slots = args.pop("pool"), args.pop("slots")
    args.pop("layout")
    want = torch.full_like(pool, 7)
    store_entries(want, pages, slots, compress(**args, index=index))
    assert torch.equal(pool, want)


def test_contract() -> None:
    pages = layout(CacheDtype.FP8, False)
    args = arguments(4, pages)
    with pytest.raises(KernelContractError, match="ratio 8, allowed: 4, 128"):
        compress_insert(**args | {"ratio": 8})
    with pytest.raises(KernelContractError, match="dtype torch"):
        compress_insert(**args | {"dtype": torch.float16})
    with pytest.raises(KernelContractError, match=r"rows: expected shape \[any, 256\]"):
        compress_insert(**args | {"ratio": 128})
    with pytest.raises(KernelContractError, match="slots: expected shape"):
        compress_insert(**args | {"slots": args["slots"][:4]})
    with pytest.raises(KernelContractError, match="slot 12 is outside"):
        compress_insert(**args | {"slots": torch.tensor([0, 1, 2, 3, 12])})


@pytest.mark.benchmark
def test_speed() -> None:
    args = arguments(4, layout(CacheDtype.FP8, False))
    print(f"compress_insert 5 entries: {microseconds(lambda: compress_insert(**args)):.0f} us")
