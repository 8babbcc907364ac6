from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import (
    CacheDtype,
    EntryKind,
    KernelContractError,
    PageLayout,
    load_entries,
    round_entries,
    store_entries,
)
from kernels.page_cache.reference import load_sequence, sequence_runs
from tests.kernels.oracle64 import (
    CACHE_DTYPES,
    DTYPES,
    ceil_pow2,
    column_slice,
    e4m3,
    fq4,
    fq8,
    index_layout,
    latent_layout,
    poisoned_pool,
    report,
)

PLAIN = {CacheDtype.FP32: torch.float32, CacheDtype.BF16: torch.bfloat16}


def random_slots(layout: PageLayout, pages: int, count: int) -> torch.Tensor:
    return torch.randperm(pages * layout.entries_per_page)[:count]


@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 512])
def test_latent_values(cache: CacheDtype, dtype: torch.dtype, dim: int) -> None:
    layout = latent_layout(cache, dim, 6)
    rows = (torch.randn(5, dim) * torch.tensor([1e-6, 0.1, 1, 30, 1e4])[:, None]).to(dtype)
    pool, slots = poisoned_pool(layout, 3), torch.tensor([17, 0, 5, 6, 11])
    store_entries(pool, layout, slots, rows)
    got = load_entries(pool, layout, slots, torch.float32)
    for row, out in zip(rows, got, strict=True):
        if cache is CacheDtype.FP8:
            nope = fq8(row[: dim - 64])
            want = torch.cat((nope, row[dim - 64 :].bfloat16().double()))
        else:
            want = row.to(PLAIN[cache]).double()
        assert torch.equal(out.double(), want)
    assert torch.equal(load_entries(pool, layout, slots, torch.bfloat16), got.bfloat16())


@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_index_values(cache: CacheDtype, dtype: torch.dtype) -> None:
    layout = index_layout(cache, 128, 64)
    rows = (torch.randn(4, 128) * torch.tensor([1e-8, 0.3, 7, 1e5])[:, None]).to(dtype)
    pool, slots = poisoned_pool(layout, 2), torch.tensor([127, 63, 64, 0])
    store_entries(pool, layout, slots, rows)
    got = load_entries(pool, layout, slots, torch.float32)
    for row, out in zip(rows, got, strict=True):
        if cache is CacheDtype.FP8:
            scale = ceil_pow2(float(row.abs().max()) / 448)
            want = torch.tensor([e4m3(float(v) / scale) * scale for v in row.double()])
        else:
            want = row.to(PLAIN[cache]).double()
        assert torch.equal(out.double(), want.double())


@pytest.mark.parametrize("kind", [EntryKind.LATENT, EntryKind.INDEX])
@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_is_load_of_store(kind: EntryKind, cache: CacheDtype, dtype: torch.dtype) -> None:
    layout = (
        latent_layout(cache, 128, 4) if kind is EntryKind.LATENT else index_layout(cache, 128, 4)
    )
    rows = torch.randn(6, 128).to(dtype) * 5
    pool, slots = poisoned_pool(layout, 2), random_slots(layout, 2, 6)
    store_entries(pool, layout, slots, rows)
    once = round_entries(rows, layout)
    assert once.dtype is dtype
    assert torch.equal(once, load_entries(pool, layout, slots, dtype))
    assert torch.equal(round_entries(once, layout), once)
    before = rows.clone()
    once.fill_(0)  # never an alias of its input
    assert torch.equal(rows, before)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rounded_latent_survives_bit_for_bit(data: st.DataObject) -> None:
    """FQ8(64) then store and load changes nothing, whatever scale the rounded maximum asks for."""
    exponents = data.draw(st.lists(st.integers(-40, 60), min_size=4, max_size=4))
    seed = data.draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    rows = (
        torch.randn(4, 192, generator=generator)
        * torch.tensor([2.0**e for e in exponents])[:, None]
    )
    layout = latent_layout(CacheDtype.FP8, 192, 4)
    rounded = torch.stack(
        [torch.cat((fq8(r[:128]), r[128:].bfloat16().double())) for r in rows]
    ).float()
    assert torch.equal(round_entries(rounded, layout), rounded)


def test_maximum_that_rounds_down_across_a_power_of_two() -> None:
    """amax just above 448 * 2^k takes scale 2^(k+1), rounds to 448 * 2^k, and then asks for 2^k."""
    layout = latent_layout(CacheDtype.FP8, 128, 1)
    for k in (-20, -3, 0, 9):
        row = torch.zeros(1, 128)
        row[0, :6] = torch.tensor([449.0, 3.0, -0.3, 2**-6, 2**-8, 1.0]) * 2.0**k
        rounded = fq8(row[0, :64]).float()
        assert float(rounded[0]) == 448.0 * 2.0**k
        row[0, :64] = rounded
        assert torch.equal(round_entries(row, layout), row)


@pytest.mark.parametrize("k", [-100, -1, 0, 30])
def test_index_scale_of_an_exact_power_of_two(k: int) -> None:
    """amax = 448 * 2^k takes scale 2^k and no larger: the smallest e4m3 value is still stored."""
    row = torch.zeros(1, 128)
    row[0, :3] = torch.tensor([448.0, 2.0**-9, -3 * 2.0**-9]) * 2.0**k
    assert torch.equal(round_entries(row, index_layout(CacheDtype.FP8, 128, 4)), row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_vectors_survive_bit_for_bit(dtype: torch.dtype) -> None:
    """Sub-scales of the four blocks up to 2^14 apart fold into e4m3 with one power-of-two scale."""
    layout = index_layout(CacheDtype.FP8, 128, 4)
    for low in range(-14, 1):
        for top in (2.0**-30, 1.0, 2.0**20):
            spread = top * torch.tensor([1.0, 2.0**low, 2.0 ** (low // 2), 2.0**low])
            values = torch.randn(6, 4, 32).clamp(-6, 6)
            values[..., 0] = 6.0  # every block really has the sub-scale it is given
            rows = torch.stack([fq4(v) for v in (values * spread[:, None]).view(6, 128)])
            assert torch.equal(round_entries(rows.to(dtype), layout).double(), rows)
    every = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, -6] * 4)
    row = torch.cat((every, every * 2.0**-14, every * 2.0**-7, torch.zeros(32)))[None]
    assert torch.equal(round_entries(row, layout), row)


def test_zero_rows_and_zero_vectors() -> None:
    for layout in (latent_layout(CacheDtype.FP8, 128, 4), index_layout(CacheDtype.FP8, 128, 4)):
        pool = poisoned_pool(layout, 1)
        before, none = pool.clone(), torch.zeros(0, dtype=torch.int64)
        store_entries(pool, layout, none, torch.zeros(0, 128))
        assert torch.equal(pool, before)
        assert load_entries(pool, layout, none, torch.float32).shape == (0, 128)
        assert round_entries(torch.zeros(0, 128), layout).shape == (0, 128)
        assert torch.equal(round_entries(torch.zeros(2, 128), layout), torch.zeros(2, 128))
        empty = poisoned_pool(layout, 0)
        assert torch.equal(
            load_entries(empty, layout, torch.tensor([-1]), torch.float32), torch.zeros(1, 128)
        )


@pytest.mark.parametrize("kind", [EntryKind.LATENT, EntryKind.INDEX])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_stored_as_one(kind: EntryKind, value: float) -> None:
    make = latent_layout if kind is EntryKind.LATENT else index_layout
    layout = make(CacheDtype.FP8, 128, 4)
    rows = torch.randn(2, 128)
    rows[1, 5] = value
    pool, slots = poisoned_pool(layout, 1), torch.tensor([2, 0])
    store_entries(pool, layout, slots, rows)
    for got in (load_entries(pool, layout, slots, torch.float32), round_entries(rows, layout)):
        assert got[0].isfinite().all()
        # The whole block: the values of all 64 columns, of an index entry all of them, share a scale.
        assert got[1, :64].isnan().all()
        assert got[1, 64:].isnan().all() == (kind is EntryKind.INDEX)


@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_missing_slots(cache: CacheDtype) -> None:
    """-1 stores nothing and loads zeros, even where slot 0 holds NaN."""
    layout = latent_layout(cache, 128, 4)
    pool = poisoned_pool(layout, 2)
    before = pool.clone()
    store_entries(pool, layout, torch.tensor([-1, -1]), torch.randn(2, 128))
    assert torch.equal(pool, before)
    store_entries(pool, layout, torch.tensor([-1, 5]), torch.ones(2, 128))
    got = load_entries(pool, layout, torch.tensor([5, -1]), torch.float32)
    assert torch.equal(got, torch.stack((torch.ones(128), torch.zeros(128))))


@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_column_slice_sglang_25396(cache: CacheDtype, dtype: torch.dtype) -> None:
    layout, rows = latent_layout(cache, 128, 4), torch.randn(4, 128).to(dtype)
    packed, sliced, slots = poisoned_pool(layout, 1), poisoned_pool(layout, 1), torch.arange(4)
    store_entries(packed, layout, slots, rows)
    store_entries(sliced, layout, slots, column_slice(rows))
    assert torch.equal(packed, sliced)
    assert torch.equal(round_entries(column_slice(rows), layout), round_entries(rows, layout))


@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_packed_pages_vllm_47493(cache: CacheDtype) -> None:
    """Pages that are columns of a wider buffer hold the same bytes, and their neighbours nothing."""
    layout = latent_layout(cache, 128, 3)
    size = layout.page_bytes
    wide = torch.full((4, 3 * size), 0xEE, dtype=torch.uint8)
    packed, plain = wide[:, size : 2 * size], poisoned_pool(layout, 4).fill_(0xEE)
    rows, slots = torch.randn(7, 128), random_slots(layout, 4, 7)
    for pool in (packed, plain):
        store_entries(pool, layout, slots, rows)
    assert torch.equal(packed, plain)
    assert torch.equal(
        load_entries(packed, layout, slots, torch.float32),
        load_entries(plain, layout, slots, torch.float32),
    )
    assert (wide[:, :size] == 0xEE).all()
    assert (wide[:, 2 * size :] == 0xEE).all()
    blocks = torch.tensor([3, 1, -1, 0], dtype=torch.int32)
    for a, b in zip(
        load_sequence(packed, layout, blocks, 11, torch.float32),
        load_sequence(plain, layout, blocks, 11, torch.float32),
        strict=True,
    ):
        assert torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))


def test_scales_are_powers_of_two_sglang_25733() -> None:
    layout = latent_layout(CacheDtype.FP8, 128, 2)
    pool = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    rows = torch.tensor([3.0, 100.0])[:, None] * torch.ones(2, 128)
    store_entries(pool, layout, torch.tensor([0, 1]), rows)
    scales = pool[0, layout.scale_offset :][: 2 * layout.scale_bytes].view(2, -1)
    want = [127 + int(torch.tensor(ceil_pow2(v / 448)).log2()) for v in (3.0, 100.0)]
    assert scales[:, 0].tolist() == want
    assert (scales[:, 1:] == 0).all()  # the pad bytes of the scale area


def test_entry_bytes_vllm_47716() -> None:
    """The stored sizes of the V4 entries, and a page of 64 as the spec counts it."""
    latent, index = latent_layout(CacheDtype.FP8, 512, 64), index_layout(CacheDtype.FP8, 128, 64)
    assert (latent.entry_bytes, latent.page_bytes) == (584, 37_440)
    assert (index.entry_bytes, index.page_bytes) == (132, 8_640)
    assert latent_layout(CacheDtype.FP8, 512, 2).page_bytes == 1_728
    assert latent_layout(CacheDtype.BF16, 512, 2).page_bytes == 2_048


@given(
    ratio=st.sampled_from([1, 4, 128]),
    block_size=st.sampled_from([128, 256, 384]),
    cache=st.sampled_from(CACHE_DTYPES),
    kind=st.sampled_from(list(EntryKind)),
    dim=st.sampled_from([128, 256, 512]),
    pages=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_page_view_bytes_vllm_43988(
    ratio: int, block_size: int, cache: CacheDtype, kind: EntryKind, dim: int, pages: int
) -> None:
    """Entries per page are block_size // ratio: every view stays inside what was allocated."""
    n = block_size // ratio
    layout = (
        latent_layout(cache, dim, n) if kind is EntryKind.LATENT else index_layout(cache, dim, n)
    )
    assert n * layout.entry_bytes <= layout.page_bytes < n * layout.entry_bytes + layout.alignment
    assert layout.page_bytes % layout.alignment == 0
    # Canaries around the pool: its last byte is the last that may be touched.
    guard, size = 64, pages * layout.page_bytes
    memory = torch.full((guard + size + guard,), 0xA5, dtype=torch.uint8)
    pool = memory[guard : guard + size].view(pages, layout.page_bytes)
    total = pages * n
    slots = torch.arange(total)
    used = torch.zeros(size, dtype=torch.bool)
    if total <= 8:
        probes = list(range(total))
    else:  # page edges and some in between
        probes = sorted({0, 1, n - 1, n % total, total - 1, total // 2})
    for slot in probes:
        pool.fill_(0)
        store_entries(pool, layout, slots[slot : slot + 1], torch.full((1, dim), 3.0))
        touched = pool.reshape(-1) != 0
        page = slot // n * layout.page_bytes
        assert touched.any()
        assert not touched[:page].any()
        assert not touched[page + layout.page_bytes :].any()
        assert not (touched & used).any(), f"slot {slot} overlaps another entry"
        used |= touched
    rows = torch.arange(1, total + 1)[:, None] * torch.ones(dim)
    store_entries(pool, layout, slots, rows)  # all at once: each still holds its own
    assert torch.equal(
        load_entries(pool, layout, slots.flip(0), torch.float32).flip(0),
        round_entries(rows, layout),
    )
    assert (memory[:guard] == 0xA5).all()
    assert (memory[-guard:] == 0xA5).all()


def test_load_sequence_follows_the_table() -> None:
    layout = latent_layout(CacheDtype.FP32, 128, 3)
    pool, rows = poisoned_pool(layout, 4), torch.randn(8, 128)
    blocks = torch.tensor([2, -1, 0], dtype=torch.int32)
    slots = torch.tensor([6, 7, 8, -1, -1, -1, 0, 1])
    store_entries(pool, layout, slots, rows)
    got, present = load_sequence(pool, layout, blocks, 8, torch.float32)
    assert present.tolist() == [True] * 3 + [False] * 3 + [True] * 2
    assert torch.equal(got, rows.masked_fill(~present[:, None], 0))
    assert load_sequence(pool, layout, blocks[:0], 0, torch.float32)[0].shape == (0, 128)
    with pytest.raises(KernelContractError, match="block table"):
        load_sequence(pool, layout, blocks, 10, torch.float32)
    with pytest.raises(KernelContractError, match="page"):
        load_sequence(pool, layout, blocks + 2, 8, torch.float32)


def test_sequence_runs() -> None:
    assert sequence_runs(torch.tensor([3, 3, 0, -1, 3])) == [
        (3, 0, 2),
        (0, 2, 3),
        (-1, 3, 4),
        (3, 4, 5),
    ]
    assert sequence_runs(torch.zeros(0, dtype=torch.int64)) == []


def test_contract() -> None:
    layout = latent_layout(CacheDtype.FP8, 128, 4)
    pool, rows = poisoned_pool(layout, 2), torch.zeros(1, 128)
    slot = torch.tensor([0])
    with pytest.raises(KernelContractError, match="slot 8"):
        store_entries(pool, layout, torch.tensor([8]), rows)
    with pytest.raises(KernelContractError, match="slot 8"):
        load_entries(pool, layout, torch.tensor([8]), torch.float32)
    with pytest.raises(KernelContractError, match="pool"):
        store_entries(pool[:, :-1], layout, slot, rows)
    with pytest.raises(KernelContractError, match="pool"):
        store_entries(pool.view(torch.int8), layout, slot, rows)
    with pytest.raises(KernelContractError, match="slots"):
        store_entries(pool, layout, slot.int(), rows)
    with pytest.raises(KernelContractError, match="rows"):
        store_entries(pool, layout, slot, rows[:, :64])
    with pytest.raises(KernelContractError, match="dtype"):
        load_entries(pool, layout, slot, torch.float16)
    with pytest.raises(KernelContractError, match="rows"):
        round_entries(rows.half(), layout)
    odd = torch.zeros(2 * layout.page_bytes + 1, dtype=torch.uint8)[1:].view(2, -1)
    with pytest.raises(KernelContractError, match="multiples of 4"):
        store_entries(odd, layout, slot, rows)


@pytest.mark.benchmark
def test_benchmark() -> None:
    layout = latent_layout(CacheDtype.FP8, 512, 64)
    pool, rows = (
        torch.zeros(64, layout.page_bytes, dtype=torch.uint8),
        torch.randn(4096, 512).bfloat16(),
    )
    slots = random_slots(layout, 64, 4096)
    report("store 4096x512 fp8", lambda: store_entries(pool, layout, slots, rows))
    report("load 4096x512 fp8", lambda: load_entries(pool, layout, slots, torch.bfloat16))
    blocks = torch.arange(64, dtype=torch.int32)
    report("load_sequence 4096", lambda: load_sequence(pool, layout, blocks, 4096, torch.bfloat16))
