"""Cases of the ops on cached entries: pages, compressor, indexer, selection, attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

import kernels
from kernels import BlockWeight, CacheDtype, EntryKind, EntryPages, WindowRing, WindowRows
from kernels.quant.reference import fake_quant_fp4
from tests.kernels.op_cases.base import (
    BF16,
    EPS,
    Case,
    Inputs,
    Make,
    Op,
    Rows,
    block_table,
    empty_pool,
    filled_pool,
    frequencies,
    layout,
    norm_weight,
    normal,
    pages_for,
    positions,
    stored_bytes,
)

LATENT, INDEX, FP8 = EntryKind.LATENT, EntryKind.INDEX, CacheDtype.FP8
SYNC = "reads its width back on the host (the contract's shape needs it); index_topk does not"


def slots_of(count: int, device: torch.device, total: int) -> Tensor:
    """Distinct slots, a tenth of them -1."""
    slots = torch.randperm(total, device=device)[:count]
    return slots.masked_fill(torch.rand(count, device=device) < 0.1, -1)


def insert(kind: EntryKind, dtype: CacheDtype, dim: int, rope: int, what: str) -> Make:
    """``store_entries`` or ``kv_insert`` into pages beyond 2^31 bytes."""

    def make(count: int, device: torch.device, stream: torch.dtype) -> Inputs:
        shape = layout(kind, dtype, 64, dim, rope)
        count_pages, far = pages_for(device, count, 64)
        freq, weight = frequencies(device, rope), norm_weight(device, dim)
        rows = {
            "slots": slots_of(count, device, count_pages * 64),
            "kv": normal(device, count, dim, dtype=stream),
        }
        if what == "kv_insert":
            rows["positions"] = positions(device, count)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            pool = empty_pool(device, shape, count_pages, far)
            kv, slots = rows["kv"], rows["slots"]
            if what == "kv_insert":
                at = rows["positions"]
                out = op(kv, weight, at, freq, EPS, pool, shape, slots, quantize=True)
                return (out, *stored_bytes(pool, shape, slots))
            op(pool, shape, slots, kv)
            return stored_bytes(pool, shape, slots)

        return Inputs(rows=rows, call=call)

    return make


def load(kind: EntryKind, dtype: CacheDtype, dim: int, rope: int) -> Make:
    def make(count: int, device: torch.device, stream: torch.dtype) -> Inputs:
        shape = layout(kind, dtype, 64, dim, rope)
        used = torch.arange(0, 40, 2, device=device)
        pool = filled_pool(device, shape, 40, used, far=device.type == "cuda")
        page = used[torch.randint(0, len(used), (count,), device=device)]
        slots = page * 64 + torch.randint(0, 64, (count,), device=device)
        slots = slots.masked_fill(torch.rand(count, device=device) < 0.1, -1)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(pool, shape, rows["slots"], stream),)

        return Inputs(rows={"slots": slots}, call=call)

    return make


def round_entries(kind: EntryKind, dtype: CacheDtype, dim: int, rope: int) -> Make:
    def make(count: int, device: torch.device, stream: torch.dtype) -> Inputs:
        shape = layout(kind, dtype, 64, dim, rope)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["x"], shape),)

        return Inputs(rows={"x": normal(device, count, dim, dtype=stream)}, call=call)

    return make


def compressor_rows(hidden: int, width: int, ratio: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        wkv, wgate = (
            kernels.prepare_weight(
                BlockWeight((torch.randn(width, hidden, device=device) * 0.02).to(BF16))
            )
            for _ in range(2)
        )
        ape = torch.randn(ratio, width, device=device)
        rows = {
            "x": normal(device, count, hidden, dtype=dtype),
            "positions": positions(device, count),
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["x"], wkv, wgate, ape, rows["positions"]),)

        return Inputs(rows=rows, call=call)

    return make


def compress(ratio: int, dim: int, rope: int, *, index: bool, store: bool) -> Make:
    """Entries gather random rows; the rows that no entry may touch are NaN."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        series = 2 if ratio == 4 else 1
        source = normal(device, 3000, 2 * series * dim)
        source[1::2] = torch.nan
        picked = 2 * torch.randint(0, 1500, (count, series * ratio), device=device)
        picked[torch.rand(picked.shape, device=device) < 0.1] = -1
        picked[3::50] = -1  # entries without any row
        freq, weight = frequencies(device, rope), norm_weight(device, dim)
        rows = {"row_index": picked, "positions": positions(device, count)}
        shape = layout(INDEX if index else LATENT, FP8, 64, dim, rope)
        count_pages, far = pages_for(device, count, 64)
        if store:
            rows["slots"] = slots_of(count, device, count_pages * 64)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            at = rows["positions"]
            if not store:
                out = op(
                    source,
                    rows["row_index"],
                    weight,
                    at,
                    freq,
                    EPS,
                    ratio=ratio,
                    index=index,
                    quantize=True,
                    dtype=dtype,
                )
                return (out,)
            pool = empty_pool(device, shape, count_pages, far)
            op(
                source,
                rows["row_index"],
                weight,
                at,
                freq,
                EPS,
                pool,
                shape,
                rows["slots"],
                ratio=ratio,
                quantize=True,
                dtype=dtype,
            )
            return stored_bytes(pool, shape, rows["slots"])

        return Inputs(rows=rows, call=call)

    return make


def indexer(heads: int, per_page: int, k: int | None) -> Make:
    """``index_score`` (k None) or ``index_topk`` over pages beyond 2^31 bytes; others hold NaN."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        shape = layout(INDEX, FP8, per_page, 128, 0)
        seqs, blocks = 3, 13
        table = block_table(device, seqs, blocks, 45)
        used = table[table >= 0]
        pool = filled_pool(device, shape, 45, used, far=device.type == "cuda")
        width = blocks * per_page
        q = fake_quant_fp4(normal(device, count, heads, 128)).to(dtype)
        run = torch.arange(count, device=device) // max(1, count // 7)
        rows = {
            "q": q,
            "w": torch.randn(count, heads, device=device),
            "row_seq": run % (seqs + 1) - 1,
            "num_entries": torch.randint(0, width + 1, (count,), device=device),
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            rest = (pool, shape, table, rows["row_seq"], rows["num_entries"])
            if k is not None:
                return (op(rows["q"], rows["w"], *rest, k),)
            scores = op(rows["q"], rows["w"], *rest)
            return (pad(scores, (0, width - scores.shape[1]), value=-torch.inf),)

        return Inputs(rows=rows, call=call)

    return make


def select(columns: int, k: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        del dtype
        start = torch.randint(0, max(1, columns // 8), (count,), device=device)
        length = torch.randint(0, columns, (count,), device=device)
        rows = {
            "scores": torch.randn(count, columns, device=device),
            "row_start": start,
            "row_end": (start + length).clamp(max=columns),
        }
        rows["scores"][::3] = rows["scores"][::3].round()  # ties

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["scores"], k, rows["row_start"], rows["row_end"]),)

        return Inputs(rows=rows, call=call)

    return make


def merge_candidates(columns: int, k: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        del dtype
        indices = torch.rand(count, columns, device=device).argsort(dim=1).to(torch.int32)
        indices[:, ::7] = -1
        rows = {"values": torch.randn(count, columns, device=device).round(decimals=1)}

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["values"], rows["indices"], k),)

        return Inputs(rows=rows | {"indices": indices}, call=call)

    return make


def attention(heads: int, window: str, topk: int | None, per_page: int = 16) -> Make:
    """Window rows or a ring, and entries of every third page; the rest of the pages holds NaN."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        seqs, blocks = 3, 11
        shape = layout(LATENT, FP8, per_page, 512, 64)
        table = block_table(device, seqs, blocks, 40)
        pool = filled_pool(device, shape, 40, table[table >= 0], far=device.type == "cuda")
        capacity = blocks * per_page
        run = torch.arange(count, device=device) // max(1, count // 7)
        rows = {
            "q": torch.randn(count, heads, 512, device=device).to(dtype),
            "row_seq": run % (seqs + 1) - 1,
            "num_entries": torch.randint(0, capacity + 1, (count,), device=device),
        }
        if topk is not None:
            index = torch.rand(count, capacity, device=device).argsort(dim=1)[:, :topk]
            index = index.masked_fill(torch.rand(index.shape, device=device) < 0.1, -1)
            rows["index"] = pad(index.to(torch.int32), (0, topk - index.shape[1]), value=-1)
        kv = torch.randn(700, 512, device=device).to(dtype)
        kv[600:] = torch.nan
        ring = layout(LATENT, FP8, 132, 512, 64)
        rings = filled_pool(device, ring, 12, torch.arange(0, 12, 2, device=device))
        if window == "rows":
            rows["start"] = torch.randint(0, 472, (count,), device=device)
            rows["length"] = torch.randint(0, 129, (count,), device=device)
        elif window == "ring":
            slots = torch.rand(count, 132, device=device).argsort(dim=1)[:, :128]
            slots += 264 * torch.randint(0, 6, (count, 1), device=device)
            rows["slots"] = slots.masked_fill(torch.rand(count, 128, device=device) < 0.1, -1)
        sink = torch.randn(heads, device=device)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            q = rows["q"]
            keys: WindowRows | WindowRing | None = None
            if window == "rows":
                keys = WindowRows(kv=kv.to(q.dtype), start=rows["start"], length=rows["length"])
            elif window == "ring":
                keys = WindowRing(pool=rings, layout=ring, slots=rows["slots"])
            entries = EntryPages(
                pool=pool,
                layout=shape,
                block_table=table,
                row_seq=rows["row_seq"],
                index=rows.get("index"),
                num_entries=rows["num_entries"],
            )
            o, lse = op(q, keys, entries, sink=sink, scale=512**-0.5)
            return o, lse

        return Inputs(rows=rows, call=call)

    return make


def merge_lse(partials: int, heads: int, dim: int, contiguous: bool) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        lse = torch.randn(count, partials, heads, device=device)
        lse[torch.rand(lse.shape, device=device) < 0.3] = -torch.inf
        o = torch.randn(count, partials, heads, dim, device=device).to(dtype)
        o[lse == -torch.inf] = torch.nan
        sink = torch.randn(heads, device=device)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            parts = rows["o"].transpose(0, 1), rows["lse"].transpose(0, 1)
            if contiguous:
                parts = parts[0].contiguous(), parts[1].contiguous()
            merged, total = op(*parts, sink)
            return merged, total

        return Inputs(rows={"o": o, "lse": lse}, call=call)

    return make


def cases() -> Iterator[Case]:
    """All of them."""
    make: Make
    insertion = functools.partial(
        Case, proof="tests/kernels/test_kv_insert_gpu.py", name="latent fp8"
    )
    for kind, dtype, dim, rope in (
        (LATENT, FP8, 512, 64),
        (LATENT, CacheDtype.BF16, 512, 64),
        (INDEX, FP8, 128, 0),
        (LATENT, CacheDtype.FP32, 80, 16),
    ):
        name, small = f"{kind.value} {dtype.value}", dim == 80
        make = insert(kind, dtype, dim, rope, "store_entries")
        yield insertion(op="store_entries", name=name, make=make, cpu=small)
        make = load(kind, dtype, dim, rope)
        yield insertion(op="load_entries", name=name, make=make, big=dim == 512, cpu=small)
        make = round_entries(kind, dtype, dim, rope)
        yield insertion(op="round_entries", name=name, make=make, big=dim == 512, cpu=small)
        if kind is LATENT:
            make = insert(kind, dtype, dim, rope, "kv_insert")
            yield insertion(op="kv_insert", name=name, make=make, cpu=small)
    for name, hidden, width, ratio in (
        ("flash csa", 4096, 1024, 4),
        ("pro hca", 7168, 512, 128),
        ("odd", 100, 24, 4),
    ):
        make = compressor_rows(hidden, width, ratio)
        yield Case(
            op="compressor_rows", name=name, make=make, bound=1e-5, cpu=width == 24, gpu=False
        )
    pooled = "tests/kernels/test_compress_gpu.py"
    for name, ratio, dim, rope, index in (
        ("csa", 4, 512, 64, False),
        ("indexer", 4, 128, 64, True),
        ("hca", 128, 512, 64, False),
        ("odd", 4, 80, 16, False),
    ):
        small = name == "odd"
        make = compress(ratio, dim, rope, index=index, store=False)
        big = name == "csa"
        yield Case(op="compress", name=name, make=make, proof=pooled, big=big, cpu=small)
        make = compress(ratio, dim, rope, index=index, store=True)
        yield Case(op="compress_insert", name=name, make=make, proof=pooled, cpu=small)
    for name, heads, per_page, k in (
        ("flash", 64, 64, 512),
        ("pro", 64, 64, 1024),
        ("odd page", 64, 50, 33),
        ("odd heads", 3, 16, 20),
    ):
        small = name == "odd heads"
        if name != "pro":
            make = indexer(heads, per_page, None)
            yield Case(
                op="index_score",
                name=name,
                make=make,
                bound=1e-3,
                no_graph=SYNC,
                big=name == "flash",
                cpu=small,
                gpu=not small,
            )
        make = indexer(heads, per_page, k)
        yield Case(
            op="index_topk",
            name=name,
            make=make,
            proof="tests/kernels/test_index_score_gpu.py",
            big=name == "flash",
            cpu=small,
            gpu=not small,
        )
    chosen = "tests/kernels/test_topk_gpu.py"
    for name, columns, k in (
        ("flash 64K", 65536, 512),
        ("pro 16K", 16384, 1024),
        ("flash 2K", 2048, 512),
        ("odd", 333, 40),
    ):
        make = select(columns, k)
        big, small = name == "flash 64K", name == "odd"
        yield Case(op="topk_select", name=name, make=make, proof=chosen, big=big, cpu=small)
    for name, columns, k in (("flash", 2048, 512), ("pro", 8192, 1024), ("odd", 77, 20)):
        make = merge_candidates(columns, k)
        big, small = name == "flash", name == "odd"
        yield Case(op="topk_merge", name=name, make=make, proof=chosen, big=big, cpu=small)
    for name, heads, topk in (("flash", 64, 512), ("pro", 128, 1024), ("odd", 6, 33)):
        for window in ("rows", "ring", "none"):
            for index in (topk, None):
                kind_ = "csa" if index else "hca"
                yield Case(
                    op="sparse_attention",
                    name=f"{name} {window} {kind_}",
                    make=attention(heads, window, index),
                    bound=4e-3,
                    big=name == "flash" and window != "none",
                    cpu=name == "odd" and window == "ring",
                )
    for name, partials, heads in (("flash", 4, 64), ("pro", 2, 128), ("odd", 3, 5)):
        for contiguous in (True, False):
            yield Case(
                op="merge_lse",
                name=name if contiguous else f"{name} view",
                make=merge_lse(partials, heads, 512 if name != "odd" else 72, contiguous),
                bound=4e-3,
                big=name == "pro" and contiguous,
                cpu=name == "odd",
            )
