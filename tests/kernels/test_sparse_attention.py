from __future__ import annotations

import math

import pytest
import torch

from kernels import (
    CacheDtype,
    EntryPages,
    KernelContractError,
    WindowRing,
    WindowRows,
    load_entries,
    merge_lse,
    sparse_attention,
    store_entries,
    wide_dtype,
)
from kernels.sparse_attention import keys as keys_of
from kernels.sparse_attention import reference
from tests.kernels.oracle64 import (
    CACHE_DTYPES,
    DTYPES,
    assert_close,
    column_slice,
    index_layout,
    latent_layout,
    poisoned_pool,
    report,
    rounded,
)

INF = float("inf")
NAN = float("nan")
Result = tuple[torch.Tensor, torch.Tensor]


def attend64(
    q: torch.Tensor, keys: list[list[torch.Tensor]], sink: torch.Tensor | None, scale: float
) -> Result:
    """The formula, one query and one head at a time; ``keys[t]`` lists the latents t attends to."""
    tokens, heads, dim = q.shape
    o = torch.zeros(tokens, heads, dim, dtype=torch.float64)
    lse = torch.full((tokens, heads), -INF, dtype=torch.float64)
    for t in range(tokens):
        for h in range(heads):
            if not keys[t]:
                continue
            z = [scale * float(q[t, h].double() @ c.double()) for c in keys[t]]
            top = max(z)
            p = [math.exp(v - top) for v in z]
            extra = math.exp(float(sink[h]) - top) if sink is not None else 0.0
            for weight, c in zip(p, keys[t], strict=True):
                o[t, h] += rounded(torch.tensor(weight, dtype=torch.float64), q.dtype) * c.double()
            o[t, h] /= sum(p) + extra
            lse[t, h] = top + math.log(sum(p))
    return o, lse


def check(got: Result, want: Result, dtype: torch.dtype) -> None:
    assert got[0].dtype is dtype
    assert got[1].dtype is wide_dtype(dtype)
    assert_close(got[0], want[0], dtype)
    assert torch.equal(got[1] == -INF, want[1] == -INF)
    seen = want[1] > -INF
    assert_close(got[1][seen], want[1][seen], wide_dtype(dtype))
    assert (got[0][~seen] == 0).all()


class Pages:
    """Entries of several sequences in scattered pages; all other bytes of the pool are NaN."""

    def __init__(
        self,
        counts: tuple[int, ...],
        *,
        cache: CacheDtype = CacheDtype.FP32,
        dim: int = 128,
        per_page: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout = latent_layout(cache, dim, per_page)
        blocks = max(-(-c // per_page) for c in counts) + 1
        self.pool = poisoned_pool(self.layout, blocks * len(counts) + 1)
        order = torch.randperm(self.pool.shape[0])[: blocks * len(counts)]
        self.block_table = order.view(len(counts), blocks).int()
        self.rows: list[torch.Tensor] = []
        for seq, count in enumerate(counts):
            entry = torch.arange(count)
            slots = self.block_table[seq].long()[entry // per_page] * per_page + entry % per_page
            store_entries(self.pool, self.layout, slots, torch.randn(count, dim))
            self.rows.append(load_entries(self.pool, self.layout, slots, dtype))

    def entries(
        self, row_seq: list[int], num_entries: list[int], index: torch.Tensor | None = None
    ) -> EntryPages:
        return EntryPages(
            pool=self.pool,
            layout=self.layout,
            block_table=self.block_table,
            row_seq=torch.tensor(row_seq, dtype=torch.int64),
            index=index,
            num_entries=torch.tensor(num_entries, dtype=torch.int64),
        )

    def keys(self, seq: int, count: int, index: list[int] | None = None) -> list[torch.Tensor]:
        """What a query sees, by the contract."""
        per_page, table = self.layout.entries_per_page, self.block_table[seq].tolist()
        wanted = range(count) if index is None else [e for e in index if 0 <= e < count]
        return [self.rows[seq][e] for e in wanted if table[e // per_page] >= 0]


def causal_window(
    tokens: int, window: int, dim: int, dtype: torch.dtype, before: int = 0
) -> WindowRows:
    """Queries at rows before.. of a buffer, each seeing up to ``window`` rows to its left."""
    at = torch.arange(tokens) + before
    start = (at - window + 1).clamp(min=0)
    return WindowRows(
        kv=torch.randn(before + tokens, dim).to(dtype), start=start, length=at + 1 - start
    )


def window_keys(window: WindowRows) -> list[list[torch.Tensor]]:
    spans = zip(window.start.tolist(), window.length.tolist(), strict=True)
    return [list(window.kv[s : s + n]) for s, n in spans]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("with_sink", [False, True])
def test_window_rows(dtype: torch.dtype, dim: int, with_sink: bool) -> None:
    q, window = torch.randn(9, 2, dim).to(dtype), causal_window(9, 5, dim, dtype, before=2)
    sink = torch.tensor([2.0, -30.0]) if with_sink else None
    got = sparse_attention(q, window, None, sink=sink, scale=dim**-0.5)
    check(got, attend64(q, window_keys(window), sink, dim**-0.5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_rows_of_scattered_sequences(dtype: torch.dtype) -> None:
    """Starts that jump in a wide buffer, empty windows, and NaN between the rows that are used."""
    kv = torch.full((5000, 128), NAN, dtype=dtype)
    start, length = torch.tensor([4000, 7, 4001, 2500, 0]), torch.tensor([3, 2, 4, 0, 1])
    for s, n in zip(start.tolist(), length.tolist(), strict=True):
        kv[s : s + n] = torch.randn(n, 128).to(dtype)
    window = WindowRows(kv=kv, start=start, length=length)
    q = torch.randn(5, 2, 128).to(dtype)
    got = sparse_attention(q, window, None, sink=None, scale=0.1)
    check(got, attend64(q, window_keys(window), None, 0.1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_window_ring(dtype: torch.dtype, cache: CacheDtype) -> None:
    layout = latent_layout(cache, 128, 8)
    pool = poisoned_pool(layout, 3)
    stored = torch.tensor([0, 3, 8, 9, 23])
    store_entries(pool, layout, stored, torch.randn(5, 128))
    slots = torch.tensor([[3, -1, 0, -1], [23, 8, 9, -1], [-1, -1, -1, -1]])
    q, sink = torch.randn(3, 2, 128).to(dtype), torch.tensor([0.5, 1.0])
    window = WindowRing(pool=pool, layout=layout, slots=slots)
    got = sparse_attention(q, window, None, sink=sink, scale=0.1)
    keys = [
        [load_entries(pool, layout, torch.tensor([s]), dtype)[0] for s in row if s >= 0]
        for row in slots.tolist()
    ]
    check(got, attend64(q, keys, sink, 0.1), dtype)


def ragged_index(counts: list[int], width: int) -> torch.Tensor:
    """Ascending random choices with -1 last, and one entry that is not visible."""
    index = torch.full((len(counts), width), -1, dtype=torch.int32)
    for t, count in enumerate(counts):
        chosen = torch.randperm(count + 1)[:width].sort().values  # count itself is out of reach
        index[t, : len(chosen)] = chosen.int()
    return index


# (row_seq, num_entries): few rows per sequence gathers, many decode the sequence once.
DECODE = ([0, 1, 0], [11, 6, 3])
PREFILL = ([0] * 6 + [1] * 5, [11, 3, 0, 7, 11, 1, 6, 6, 0, 1, 5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("width", [None, 4, 8], ids=["all", "top4", "top8"])
@pytest.mark.parametrize("gather_cost", [0, 32])
def test_entries(
    dtype: torch.dtype,
    cache: CacheDtype,
    rows: tuple[list[int], list[int]],
    width: int | None,
    gather_cost: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All entries, chosen ones gathered or masked: window and sink in the same sum."""
    monkeypatch.setattr(keys_of, "_GATHER_COST", gather_cost)
    row_seq, counts = rows
    tokens, pages = len(row_seq), Pages((11, 6), cache=cache, dtype=dtype)
    pages.block_table[0, 1] = -1  # entries 4..7 of sequence 0 live elsewhere
    index = None if width is None else ragged_index(counts, width)
    q, sink = torch.randn(tokens, 3, 128).to(dtype), torch.tensor([0.0, 3.0, -3.0])
    window = causal_window(tokens, 3, 128, dtype)
    keys = window_keys(window)
    for t in range(tokens):
        chosen = None if index is None else index[t].tolist()
        keys[t] += pages.keys(row_seq[t], counts[t], chosen)
    entries = pages.entries(row_seq, counts, index)
    got = sparse_attention(q, window, entries, sink=sink, scale=0.2)
    check(got, attend64(q, keys, sink, 0.2), dtype)


@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dim", [128, 512])
def test_entries_alone(rows: tuple[list[int], list[int]], dim: int) -> None:
    row_seq, counts = rows
    pages = Pages((11, 6), dim=dim, cache=CacheDtype.FP8, per_page=2)
    q = torch.randn(len(row_seq), 2, dim)
    got = sparse_attention(q, None, pages.entries(row_seq, counts), sink=None, scale=0.05)
    keys = [pages.keys(s, n) for s, n in zip(row_seq, counts, strict=True)]
    check(got, attend64(q, keys, None, 0.05), torch.float32)


@pytest.mark.parametrize("sink", [None, torch.tensor([5.0, -5.0])])
@pytest.mark.parametrize("rows", [1, 9])
def test_rows_without_any_key(sink: torch.Tensor | None, rows: int) -> None:
    """o = 0 and lse = -inf, whether nothing is passed or everything is masked."""
    q, pages = torch.randn(rows, 2, 128), Pages((4,))
    none = torch.zeros(rows, dtype=torch.int64)
    window = WindowRows(kv=torch.full((3, 128), NAN), start=none, length=none)
    ring = WindowRing(
        pool=pages.pool, layout=pages.layout, slots=torch.full((rows, 3), -1, dtype=torch.int64)
    )
    hidden = pages.entries([0] * rows, [4] * rows, torch.full((rows, 2), -1, dtype=torch.int32))
    nobody = pages.entries([-1] * rows, [4] * rows)
    for w, e in ((None, None), (window, None), (ring, hidden), (window, nobody), (None, hidden)):
        o, lse = sparse_attention(q, w, e, sink=sink, scale=1.0)
        assert torch.equal(o, torch.zeros_like(q))
        assert (lse == -INF).all()
    pages.block_table.fill_(-1)
    o, lse = sparse_attention(q, None, pages.entries([0] * rows, [4] * rows), sink=sink, scale=1.0)
    assert torch.equal(o, torch.zeros_like(q))
    assert (lse == -INF).all()


@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("width", [None, 4, 8], ids=["all", "top4", "top8"])
@pytest.mark.parametrize("gather_cost", [0, 32])
def test_one_bad_request_stays_alone(
    rows: tuple[list[int], list[int]],
    width: int | None,
    gather_cost: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN keys that a query may not see do not reach it, though its neighbours use them."""
    monkeypatch.setattr(keys_of, "_GATHER_COST", gather_cost)
    row_seq, counts = rows
    tokens, pages = len(row_seq), Pages((11, 6))
    index = None if width is None else ragged_index(counts, width)
    q, window = torch.randn(tokens, 2, 128), causal_window(tokens, 2, 128, torch.float32)
    entries = pages.entries(row_seq, counts, index)
    want_o, want_lse = sparse_attention(q, window, entries, sink=None, scale=0.1)
    page, offset = int(pages.block_table[0, 2]), 10 % 4  # entry 10 of sequence 0
    slot = torch.tensor([page * 4 + offset])
    store_entries(pages.pool, pages.layout, slot, torch.full((1, 128), NAN))
    window.kv[tokens - 1] = NAN  # the last query's own row
    o, lse = sparse_attention(q, window, entries, sink=None, scale=0.1)
    hit = 0
    for t in range(tokens):
        uses = t == tokens - 1 or (
            row_seq[t] == 0 and counts[t] > 10 and (index is None or 10 in index[t].tolist())
        )
        hit += uses
        if uses:
            assert torch.isnan(o[t]).all()
        else:
            assert_close(o[t], want_o[t].double(), torch.float32)
            assert_close(lse[t], want_lse[t].double(), torch.float32)
    assert 0 < hit < tokens


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    row_seq, counts = PREFILL
    pages = Pages((11, 6))
    q, window = torch.randn(11, 2, 128), causal_window(11, 4, 128, torch.float32)
    for index in (None, ragged_index(counts, 3)):
        entries = pages.entries(row_seq, counts, index)
        want = sparse_attention(q, window, entries, sink=None, scale=0.1)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_CHUNK", 1)
            single = sparse_attention(q, window, entries, sink=None, scale=0.1)
        check(single, (want[0].double(), want[1].double()), torch.float32)
        with monkeypatch.context() as patch:  # too many entries to keep decoded: read per chunk
            patch.setattr(keys_of, "_CACHED_VALUES", 0)
            gathered = sparse_attention(q, window, entries, sink=None, scale=0.1)
        check(gathered, (want[0].double(), want[1].double()), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_merge_to_the_whole(dtype: torch.dtype) -> None:
    """Window and halves of the pages on three ranks, merged with the sink once, equal one call."""
    row_seq, counts = PREFILL
    pages = Pages((11, 6), dtype=dtype)
    q, window = torch.randn(11, 2, 128).to(dtype), causal_window(11, 3, 128, dtype)
    sink = torch.tensor([1.0, 2.0])
    want = sparse_attention(q, window, pages.entries(row_seq, counts), sink=sink, scale=0.1)
    parts = [sparse_attention(q, window, None, sink=None, scale=0.1)]
    whole = pages.block_table.clone()
    for owner in (0, 1):
        pages.block_table = whole.clone()
        pages.block_table[:, 1 - owner :: 2] = -1
        parts.append(
            sparse_attention(q, None, pages.entries(row_seq, counts), sink=None, scale=0.1)
        )
    o, lse = merge_lse(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]), sink)
    check((o, lse), (want[0].double(), want[1].double()), dtype)


def test_huge_logits_and_sinks() -> None:
    q, window = 100 * torch.randn(4, 2, 128), causal_window(4, 3, 128, torch.float32)
    sink = torch.tensor([1e4, -1e4])
    got = sparse_attention(q, window, None, sink=sink, scale=1.0)
    assert torch.equal(got[0][:, 0], torch.zeros(4, 128))
    bare = sparse_attention(q, window, None, sink=None, scale=1.0)
    assert torch.equal(got[0][:, 1], bare[0][:, 1])
    assert torch.equal(got[1], bare[1])


def test_kv_column_slice_sglang_25396() -> None:
    row_seq, counts = PREFILL
    pages = Pages((11, 6))
    q, window = torch.randn(11, 2, 128), causal_window(11, 4, 128, torch.float32)
    index = ragged_index(counts, 8)
    want = sparse_attention(q, window, pages.entries(row_seq, counts, index), sink=None, scale=0.1)
    wide = torch.full((11, 20), 3, dtype=torch.int32)
    wide[:, 5:13] = index
    strided = WindowRows(kv=column_slice(window.kv), start=window.start, length=window.length)
    got = sparse_attention(
        column_slice(q),
        strided,
        pages.entries(row_seq, counts, wide[:, 5:13]),
        sink=None,
        scale=0.1,
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_zero_rows() -> None:
    none, pages = torch.zeros(0, dtype=torch.int64), Pages((4,))
    window = WindowRows(kv=torch.zeros(0, 128), start=none, length=none)
    for w, e in ((window, pages.entries([], [])), (None, None)):
        o, lse = sparse_attention(torch.zeros(0, 2, 128), w, e, sink=None, scale=1.0)
        assert (o.shape, lse.shape) == ((0, 2, 128), (0, 2))


@pytest.mark.parametrize("tokens", [2, 9])
def test_contract(tokens: int) -> None:
    q, pages = torch.zeros(tokens, 2, 128), Pages((8,))
    seq = [0] * tokens

    def call(window: WindowRows | WindowRing | None, entries: EntryPages | None) -> None:
        sparse_attention(q, window, entries, sink=None, scale=1.0)

    with pytest.raises(KernelContractError, match="block"):
        call(None, pages.entries(seq, [13] * tokens))
    beyond = torch.full((tokens, 1), 12, dtype=torch.int32)
    with pytest.raises(KernelContractError, match="block"):
        call(None, pages.entries(seq, [20] * tokens, beyond))
    with pytest.raises(KernelContractError, match="index"):
        call(None, pages.entries(seq, [1] * tokens, beyond.long()))
    with pytest.raises(KernelContractError, match="row_seq"):
        call(None, pages.entries([0], [1] * tokens))
    window = causal_window(tokens, 2, 128, torch.float32)
    with pytest.raises(KernelContractError, match="outside kv"):
        call(WindowRows(kv=window.kv, start=window.start + 1, length=window.length), None)
    with pytest.raises(KernelContractError, match="outside kv"):
        call(WindowRows(kv=window.kv, start=window.start - 1, length=window.length), None)
    with pytest.raises(KernelContractError, match=r"window\.kv"):
        call(WindowRows(kv=window.kv.bfloat16(), start=window.start, length=window.length), None)
    slots = torch.zeros(tokens, 1, dtype=torch.int64)
    with pytest.raises(KernelContractError, match="slots"):
        call(WindowRing(pool=pages.pool, layout=pages.layout, slots=slots.int()), None)
    wrong = index_layout(CacheDtype.FP32, 128, 4)
    with pytest.raises(KernelContractError, match="index entries"):
        call(WindowRing(pool=pages.pool, layout=wrong, slots=slots), None)
    with pytest.raises(KernelContractError, match="sink"):
        sparse_attention(q, None, None, sink=torch.zeros(3), scale=1.0)


@pytest.mark.benchmark
def test_benchmark() -> None:
    layout = latent_layout(CacheDtype.FP8, 512, 64)
    pool = torch.zeros(32, layout.page_bytes, dtype=torch.uint8)
    store_entries(pool, layout, torch.arange(2048), torch.randn(2048, 512))
    for tokens, width in ((256, 512), (256, None), (1, None)):
        index = None
        if width is not None:
            index = torch.stack([torch.randperm(2048)[:width] for _ in range(tokens)]).int()
        entries = EntryPages(
            pool=pool,
            layout=layout,
            block_table=torch.arange(32, dtype=torch.int32)[None],
            row_seq=torch.zeros(tokens, dtype=torch.int64),
            index=index,
            num_entries=torch.full((tokens,), 2048),
        )
        q, window = (
            torch.randn(tokens, 8, 512).bfloat16(),
            causal_window(tokens, 128, 512, torch.bfloat16),
        )
        report(
            f"sparse_attention {tokens}x8x512, window 128, {width or 'all'} of 2048",
            lambda q=q, w=window, e=entries: sparse_attention(q, w, e, sink=None, scale=0.04),
            repeats=2,
        )
