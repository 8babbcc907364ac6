"""Attention kernels on the GPU against the float32 twin on the same values, and their bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import CacheDtype, EntryPages, WindowRing, WindowRows
from kernels.merge_lse import cuda_impl as merge
from kernels.merge_lse import reference as merge_reference
from kernels.page_cache import reference as pages
from kernels.sparse_attention import cuda_impl, reference
from tests.kernels.attention_gpu import causal_rows, error, random_entries, random_ring

pytestmark = pytest.mark.gpu
SCALE = 512**-0.5
O_BOUND, LSE_BOUND = 4e-3, 1e-4  # one bfloat16 rounding of p and one of o; f32 sums


def queries(rows: int, heads: int) -> Tensor:
    return 3 * torch.randn(rows, heads, 512, device="cuda", dtype=torch.bfloat16)


def check(
    q: Tensor,
    window: WindowRows | WindowRing | None,
    entries: EntryPages | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    got = cuda_impl.sparse_attention(q, window, entries, sink=sink, scale=SCALE)
    wide = window
    if isinstance(window, WindowRows):
        wide = dataclasses.replace(window, kv=window.kv.float())
    want = reference.sparse_attention(q.float(), wide, entries, sink=sink, scale=SCALE)
    assert got[0].dtype is torch.bfloat16
    assert torch.isfinite(got[0]).all()
    assert error(got[0], want[0]) < O_BOUND
    assert error(got[1], want[1]) < LSE_BOUND
    empty = want[1] == -torch.inf
    assert (got[0][empty] == 0).all()
    return got


@pytest.mark.parametrize("heads", [1, 16, 64, 100, 128])
@pytest.mark.parametrize("topk", [None, 200])
def test_prefill(heads: int, topk: int | None) -> None:
    entries = random_entries(150, seqs=3, blocks=9, per_page=32, topk=topk)
    check(queries(150, heads), causal_rows(150, 128), entries, torch.randn(heads, device="cuda"))


@pytest.mark.parametrize("dtype", list(CacheDtype))
@pytest.mark.parametrize("topk", [None, 96])
def test_prefill_page_formats_holes_and_odd_addresses(dtype: CacheDtype, topk: int | None) -> None:
    entries = random_entries(
        40, seqs=2, blocks=5, per_page=64, topk=topk, dtype=dtype, holes=True, pad=4
    )
    check(queries(40, 64), causal_rows(40, 128, before=30), entries, None)
    empty = dataclasses.replace(entries, num_entries=torch.zeros_like(entries.num_entries))
    check(queries(40, 64), causal_rows(40, 20), empty, None)


def test_prefill_rows_without_keys() -> None:
    window = causal_rows(260, 128)
    window.length[::2] = 0
    got = check(queries(260, 64), window, None, torch.randn(64, device="cuda"))
    assert (got[1][::2] == -torch.inf).all()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 97, 160])
@pytest.mark.parametrize("holes", [False, True])
def test_prefill_where_keys_begin_and_end_anywhere_in_a_tile(width: int, holes: bool) -> None:
    entries = random_entries(200, seqs=3, blocks=40, per_page=8, topk=None, holes=holes)
    check(queries(200, 64), causal_rows(200, width), entries, torch.randn(64, device="cuda"))


@pytest.mark.parametrize("factor", [0, 20, 100])
@pytest.mark.parametrize("topk", [None, 200])
def test_prefill_where_scores_of_a_row_lie_far_apart(factor: int, topk: int | None) -> None:
    """The last keys have the largest scores, the first ones, or none has."""
    entries = random_entries(140, seqs=1, blocks=6, per_page=64, topk=topk, full=True)
    window = causal_rows(140, 128, before=128)
    q = queries(140, 64) * factor
    check(q, window, entries, torch.randn(64, device="cuda"))
    rising = torch.linspace(0.01, 4, len(window.kv), device="cuda").to(torch.bfloat16)[:, None]
    check(q, dataclasses.replace(window, kv=window.kv * rising), None, None)
    check(q, dataclasses.replace(window, kv=window.kv * rising.flip(0)), entries, None)


@pytest.mark.parametrize("heads", [1, 8, 16, 17, 64, 128])
@pytest.mark.parametrize("topk", [None, 512, 1024, 2048])
def test_decode(heads: int, topk: int | None) -> None:
    entries = random_entries(12, seqs=3, blocks=40, per_page=64, topk=topk)
    sink = torch.randn(heads, device="cuda")
    q = queries(12, heads)
    check(q, random_ring(12, 128, CacheDtype.FP8), entries, sink)
    check(q, None, entries, sink)


@pytest.mark.parametrize("dtype", list(CacheDtype))
@pytest.mark.parametrize("topk", [None, 64])
@pytest.mark.parametrize("heads", [16, 64])
def test_decode_page_formats_holes_and_odd_addresses(
    heads: int, dtype: CacheDtype, topk: int | None
) -> None:
    entries = random_entries(
        9, seqs=3, blocks=7, per_page=16, topk=topk, dtype=dtype, holes=True, pad=4
    )
    check(queries(9, heads), random_ring(9, 128, dtype), entries, None)
    check(queries(9, heads), random_ring(9, 50, CacheDtype.FP8), entries, None)
    check(
        queries(9, heads),
        random_ring(9, 1, CacheDtype.BF16),
        None,
        torch.randn(heads, device="cuda"),
    )


@pytest.mark.parametrize("heads", [16, 64])
def test_decode_without_any_key(heads: int) -> None:
    ring = random_ring(5, 128, CacheDtype.FP8)
    ring.slots[1:3] = -1
    got = check(queries(5, heads), ring, None, torch.randn(heads, device="cuda"))
    assert (got[1][1:3] == -torch.inf).all()
    check(queries(5, heads), None, None, torch.randn(heads, device="cuda"))


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("keys", [79, 80, 81, 159, 160, 161])
def test_decode_around_the_length_of_a_chunk(keys: int, heads: int) -> None:
    window, entries = min(keys, 120), None
    if keys > window:
        entries = random_entries(3, seqs=3, blocks=3, per_page=64, topk=keys - window, full=True)
    check(queries(3, heads), random_ring(3, window, CacheDtype.FP8), entries, None)


@pytest.mark.parametrize("factor", [0, 20, 100])
@pytest.mark.parametrize("heads", [16, 64])
def test_decode_where_scores_of_a_chunk_lie_far_apart(heads: int, factor: int) -> None:
    ring = random_ring(8, 128, CacheDtype.FP8, full=True)
    ring.slots[1, :96] = -1
    ring.slots[2, 96:] = -1
    entries = random_entries(8, seqs=8, blocks=3, per_page=64, topk=100, full=True)
    q = queries(8, heads) * factor
    check(q, ring, entries, None)
    check(q, ring, None, torch.randn(heads, device="cuda"))


@pytest.mark.parametrize("heads", [16, 64])
def test_decode_of_entries_whose_scales_are_beyond_the_factors_of_one_product(heads: int) -> None:
    entries = random_entries(9, seqs=3, blocks=7, per_page=16, topk=64)
    slots = torch.arange(entries.pool.shape[0] * 16, device="cuda")
    powers = torch.randint(10, 20, (len(slots), 1), device="cuda").float()
    rows = torch.randn(len(slots), 512, device="cuda") * torch.exp2(powers)
    pages.store_entries(entries.pool, entries.layout, slots, rows.to(torch.bfloat16))
    q = queries(9, heads) * 2**-19
    check(q, random_ring(9, 50, CacheDtype.FP8), entries, torch.randn(heads, device="cuda"))


def rows_of(x: Any, rows: slice) -> Any:
    if isinstance(x, WindowRows):
        return dataclasses.replace(x, start=x.start[rows], length=x.length[rows])
    if isinstance(x, WindowRing):
        return dataclasses.replace(x, slots=x.slots[rows])
    index = None if x.index is None else x.index[rows]
    return dataclasses.replace(
        x, row_seq=x.row_seq[rows], index=index, num_entries=x.num_entries[rows]
    )


@pytest.mark.parametrize("topk", [None, 512])
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("heads", [16, 64])
def test_a_row_has_the_same_bits_in_any_batch(heads: int, prefill: bool, topk: int | None) -> None:
    rows = 300
    entries = random_entries(rows, seqs=3, blocks=14, per_page=64, topk=topk)
    window = causal_rows(rows, 128) if prefill else random_ring(rows, 128, CacheDtype.FP8)
    q, sink = queries(rows, heads), torch.randn(heads, device="cuda")
    o, lse = cuda_impl.sparse_attention(q, window, entries, sink=sink, scale=SCALE)
    for part in (slice(0, 1), slice(7, 8), slice(130, 299)):
        alone = cuda_impl.sparse_attention(
            q[part], rows_of(window, part), rows_of(entries, part), sink=sink, scale=SCALE
        )
        assert torch.equal(alone[0], o[part])
        assert torch.equal(alone[1], lse[part])


@pytest.mark.parametrize("heads", [16, 64])
def test_decode_bits_do_not_depend_on_the_table_width(heads: int) -> None:
    """Chunks that a wide table has room for, and a row has no keys for, change nothing."""
    narrow = random_entries(6, seqs=3, blocks=8, per_page=64, topk=None)
    table = torch.full((3, 50), -1, dtype=torch.int32, device="cuda")
    table[:, :8] = narrow.block_table
    wide = dataclasses.replace(narrow, block_table=table)
    q, ring = queries(6, heads), random_ring(6, 128, CacheDtype.FP8)
    a = cuda_impl.sparse_attention(q, ring, narrow, sink=None, scale=SCALE)
    b = cuda_impl.sparse_attention(q, ring, wide, sink=None, scale=SCALE)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_strided_queries_and_no_rows() -> None:
    wide = queries(20, 70)
    check(wide[::2, 3:67], random_ring(10, 128, CacheDtype.FP8), None, None)
    check(wide[::2, 3:19], random_ring(10, 128, CacheDtype.FP8), None, None)
    check(wide[::2, 3:67], causal_rows(10, 5), None, None)
    check(queries(0, 64), causal_rows(0, 5), None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_sink", [False, True])
def test_merge_lse(dtype: torch.dtype, with_sink: bool) -> None:
    o = torch.randn(5, 33, 16, 512, device="cuda").to(dtype)
    lse = 3 * torch.randn(5, 33, 16, device="cuda")
    lse[torch.rand_like(lse) < 0.4] = -torch.inf
    lse[:, 3] = -torch.inf
    o[(lse == -torch.inf)] = torch.nan
    sink = torch.randn(16, device="cuda") if with_sink else None
    got, want = merge.merge_lse(o, lse, sink), merge_reference.merge_lse(o.float(), lse, sink)
    assert error(got[0], want[0]) < (2e-3 if dtype is torch.bfloat16 else 1e-5)
    assert error(got[1], want[1]) < 1e-5
    alone = merge.merge_lse(o[:, 7:9, 2:5], lse[:, 7:9, 2:5], None if sink is None else sink[2:5])
    assert torch.equal(alone[0], got[0][7:9, 2:5])
