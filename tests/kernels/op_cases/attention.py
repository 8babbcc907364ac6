"""Cases of the ops that read cached entries: indexer, selection, attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import CacheDtype, EntryKind, EntryPages, WindowRing, WindowRows
from kernels.quant.reference import fake_quant_fp4
from tests.kernels.op_cases.base import (
    Case,
    Inputs,
    Make,
    Op,
    Rows,
    block_table,
    filled_pool,
    layout,
    normal,
)

LATENT, INDEX, FP8 = EntryKind.LATENT, EntryKind.INDEX, CacheDtype.FP8
SYNC = "reads its width back on the host (the contract's shape needs it); index_topk does not"


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


def attention(
    heads: int, window: str, topk: int | None, per_page: int = 16, pages: CacheDtype = FP8
) -> Make:
    """Window rows or a ring, and entries of every third page; the rest of the pages holds NaN."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        seqs, blocks = 3, 11
        shape = layout(LATENT, pages, per_page, 512, 64)
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
        ring = layout(LATENT, pages, 132, 512, 64)
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
