"""``qkv_norm_rope`` is ``q_norm_rope``, ``kv_insert`` and ``index_query``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import (
    CacheDtype,
    EntryKind,
    KernelContractError,
    PageLayout,
    index_query,
    kv_insert,
    q_norm_rope,
    qkv_norm_rope,
)
from tests.helpers.strided import column_slice, microseconds
from tests.kernels.oracle64 import frequencies

EPS = 1e-6


def layout(cache: CacheDtype = CacheDtype.FP8, dim: int = 128) -> PageLayout:
    return PageLayout(
        kind=EntryKind.LATENT, dtype=cache, head_dim=dim, rope_dim=64, entries_per_page=3
    )


def arguments(tokens: int = 6, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    pages = layout()
    return {
        "q": column_slice(torch.randn(tokens, 5, 128).to(dtype)),
        "kv": column_slice(torch.randn(tokens, 128).to(dtype)),
        "kv_weight": torch.randn(128),
        "positions": torch.randint(0, 1 << 20, (tokens,)),
        "inv_freq": frequencies(64),
        "eps": EPS,
        "pool": torch.full((4, pages.page_bytes), 7, dtype=torch.uint8),
        "layout": pages,
        "slots": torch.tensor([7, -1, 0, 11, -1, 4])[:tokens],
        "quantize": True,
        "index_q": column_slice(torch.randn(tokens, 3, 64).to(dtype)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("indexer", [True, False])
def test_it_is_the_three_ops(
    indexer: bool, quantize: bool, cache: CacheDtype, dtype: torch.dtype
) -> None:
    pages = layout(cache)
    args = arguments(dtype=dtype) | {"layout": pages, "quantize": quantize}
    args["pool"] = torch.full((4, pages.page_bytes), 7, dtype=torch.uint8)
    if not indexer:
        args["index_q"] = None
    heads, latents, index = qkv_norm_rope(**args)
    at, freq = args["positions"], args["inv_freq"]
    assert torch.equal(heads, q_norm_rope(args["q"], at, freq, EPS))
    pool = torch.full_like(args["pool"], 7)
    want = kv_insert(
        args["kv"],
        args["kv_weight"],
        at,
        freq,
        EPS,
        pool,
        pages,
        args["slots"],
        quantize=quantize,
    )
    assert torch.equal(latents, want)
    assert torch.equal(args["pool"], pool)
    if indexer:
        assert index is not None
        assert torch.equal(index, index_query(args["index_q"], at, freq, quantize=quantize))
    else:
        assert index is None


def test_no_rows() -> None:
    args = arguments(0)
    heads, latents, index = qkv_norm_rope(**args)
    assert (heads.shape, latents.shape) == ((0, 5, 128), (0, 128))
    assert index is not None
    assert index.shape == (0, 3, 64)
    assert bool((args["pool"] == 7).all())


def test_contract() -> None:
    args = arguments()
    with pytest.raises(KernelContractError, match=r"kv: expected shape \[6, 128\]"):
        qkv_norm_rope(**args | {"kv": args["kv"][:5]})
    with pytest.raises(KernelContractError, match="kv: expected dtype bfloat16"):
        qkv_norm_rope(**args | {"kv": args["kv"].float()})
    pages = layout(dim=192)
    pool = torch.zeros(4, pages.page_bytes, dtype=torch.uint8)
    with pytest.raises(KernelContractError, match="head_dim 128, got 192"):
        qkv_norm_rope(**args | {"layout": pages, "pool": pool})
    with pytest.raises(KernelContractError, match="index head dim 96 must be a power of two"):
        qkv_norm_rope(**args | {"index_q": torch.zeros(6, 3, 96, dtype=torch.bfloat16)})
    with pytest.raises(KernelContractError, match=r"index_q: inv_freq .* but rows have 32"):
        qkv_norm_rope(**args | {"index_q": torch.zeros(6, 3, 32, dtype=torch.bfloat16)})
    with pytest.raises(KernelContractError, match="slot 12 is outside"):
        qkv_norm_rope(**args | {"slots": torch.tensor([0, 1, 2, 3, 12, 5])})


@pytest.mark.benchmark
def test_speed() -> None:
    args = arguments()
    print(f"qkv_norm_rope 6 tokens: {microseconds(lambda: qkv_norm_rope(**args)):.0f} us")
