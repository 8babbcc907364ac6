"""``qkv_norm_rope`` on the GPU: near the twin, and the bits of the ops it joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, PageLayout
from kernels.qkv_norm_rope import reference
from tests.helpers.gpu import DEVICE, Implementation, assert_near, assert_rows_alone, there
from tests.helpers.strided import column_slice
from tests.kernels.oracle64 import frequencies

pytestmark = pytest.mark.gpu
fused = Implementation("kernels.qkv_norm_rope.cuda_impl")
query = Implementation("kernels.index_query.cuda_impl")
norm = Implementation("kernels.q_norm_rope.cuda_impl")
insert = Implementation("kernels.kv_insert.cuda_impl")
EPS = 1e-6


def products(tokens: int, widths: list[int], dtype: torch.dtype, gap: int) -> list[Tensor]:
    """Column slices of one wide product; NaN before, between and behind them."""
    total = sum(widths) + gap * (len(widths) + 1)
    wide = torch.full((tokens, total), float("nan"), dtype=dtype, device=DEVICE)
    out, at = [], gap
    for width in widths:
        wide[:, at : at + width] = torch.randn(tokens, width, device=DEVICE) * 3
        out.append(wide[:, at : at + width])
        at += width + gap
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "heads", "index_heads", "dims", "gap"),
    [
        (5, 16, 64, (512, 128), 8),
        (33, 64, 0, (512, 128), 0),
        (700, 5, 9, (512, 128), 3),
        (2, 128, 64, (512, 64), 8),
        (3, 4, 2, (128, 64), 8),
        (4, 3, 2, (192, 32), 8),  # the ops one after the other
        (0, 16, 64, (512, 128), 8),
    ],
)
def test_near_the_twin_with_the_bits_of_the_ops(
    tokens: int,
    heads: int,
    index_heads: int,
    dims: tuple[int, int],
    gap: int,
    quantize: bool,
    cache: CacheDtype,
    dtype: torch.dtype,
) -> None:
    dim, index_dim = dims
    rope = min(64, index_dim)
    if (dim - rope) % 64:  # no whole FP8 blocks
        quantize, cache = False, CacheDtype.BF16
    pages = PageLayout(
        kind=EntryKind.LATENT, dtype=cache, head_dim=dim, rope_dim=rope, entries_per_page=5
    )
    widths = [heads * dim, dim] + ([index_heads * index_dim] if index_heads else [])
    q, kv, *index = products(tokens, widths, dtype, gap)
    count = tokens // 5 + 3
    slots = torch.randperm(count * 5)[:tokens]
    slots[1::5] = -1
    args: dict[str, Any] = {
        "q": q.view(tokens, heads, dim),
        "kv": kv,
        "kv_weight": there(torch.randn(dim).to(dtype)),
        "positions": there(torch.randint(0, 1 << 20, (tokens,))),
        "inv_freq": there(frequencies(rope)),
        "eps": EPS,
        "layout": pages,
        "slots": there(slots),
        "quantize": quantize,
        "index_q": index[0].view(tokens, index_heads, index_dim) if index else None,
    }
    pool = there(column_slice(torch.randint(0, 256, (count, pages.page_bytes)).byte(), 4, 8))
    pools = [pool.clone() for _ in range(3)]
    got = fused.qkv_norm_rope(**args, pool=pools[0])
    want = reference.qkv_norm_rope(**args, pool=pools[1])
    bound = 3e-3 if dtype is torch.bfloat16 else 2e-6
    assert_near(got[0], want[0], bound=bound, unequal=0.05 if dtype is torch.bfloat16 else 1.0)
    assert_near(got[1], want[1], bound=5e-3)
    if index:
        assert want[2] is not None
        assert_near(got[2], want[2], bound=2e-2 if quantize else bound)
    at, freq = args["positions"], args["inv_freq"]
    assert torch.equal(got[0], norm.q_norm_rope(args["q"], at, freq, EPS))
    alone = insert.kv_insert(
        kv, args["kv_weight"], at, freq, EPS, pools[2], pages, args["slots"], quantize=quantize
    )
    assert torch.equal(got[1], alone)
    assert torch.equal(pools[0], pools[2])
    if index:
        made = query.index_query(args["index_q"], at, freq, quantize=quantize)
        assert torch.equal(got[2], made)

    def one(part: int) -> Any:
        def run(s: slice) -> Tensor:
            cut = {k: args[k][s] for k in ("q", "kv", "positions", "slots")}
            iq = args["index_q"][s] if index else None
            out: Tensor = fused.qkv_norm_rope(**args | cut | {"index_q": iq}, pool=pools[2])[part]
            return out

        return run

    for part in range(3 if index else 2):
        assert_rows_alone(one(part), got[part], [r for r in (0, 1, tokens - 1) if 0 <= r < tokens])
    assert torch.equal(pools[0], pools[2])
