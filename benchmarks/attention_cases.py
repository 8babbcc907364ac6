"""Attention ops: index score, top-k, sparse attention over fp8 pages, lse merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import library
from benchmarks.case import DEEP_GEMM, FLASH_MLA, FP8_TFLOPS, Case, Timed, own, randn, sets
from kernels import CacheDtype, EntryKind, EntryPages, PageLayout
from kernels.quant.reference import fake_quant_fp4
from tests.kernels.attention_gpu import (
    causal_rows,
    layout,
    random_entries,
    random_pool,
    random_ring,
    random_table,
)

ENTRY_BYTES, INDEX_BYTES = 584, 132
SCALE = 512**-0.5


def cases() -> Iterator[Case]:
    """Every case."""
    yield from topk_cases()
    yield from score_cases()
    yield from prefill_cases()
    yield from decode_cases()
    yield from merge_cases()


def topk_cases() -> Iterator[Case]:
    """Selection, rows of scores with padding between them."""

    def select(rows: int, columns: int, k: int) -> Timed:
        op = own("topk_select")
        held = 1 if rows == 1024 else 4
        inputs = [randn(rows, columns + 256, dtype=torch.float32)[:, :columns] for _ in range(held)]
        return Timed(
            calls=[partial(op, x, k) for x in inputs],
            library=[lambda: torch.topk(inputs[0], k, dim=1)],
        )

    for rows, columns, k in [
        (1024, 65536, 512),
        (1024, 65536, 1024),
        (1024, 8192, 512),
        (1, 262144, 512),
        (8, 262144, 512),
        (32, 65536, 512),
        (128, 16384, 512),
    ]:
        yield Case(
            op="topk_select",
            shape=f"{rows} x {columns}, k {k}",
            make=partial(select, rows, columns, k),
            moved=rows * (columns * 4.0 + k * 4),
            library="torch.topk",
        )

    def merge() -> Timed:
        op = own("topk_merge")
        values = randn(128, 2048, dtype=torch.float32)
        indices = torch.rand(128, 2048, device="cuda").argsort(dim=1).to(torch.int32)
        return Timed(calls=[lambda: op(values, indices, 512)])

    yield Case(
        op="topk_merge", shape="128 x 2048, k 512", make=merge, moved=128 * (2048 * 8.0 + 512 * 4)
    )


ScoreInputs = tuple[Tensor, Tensor, Tensor, PageLayout, Tensor, Tensor, Tensor]


def score_inputs(rows: int, seqs: int, width: int) -> ScoreInputs:
    """Arguments of ``index_score``: every row sees ``width`` entries of its sequence."""
    blocks = width // 64
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, 64)
    pool = random_pool(shape, seqs * blocks)
    q = fake_quant_fp4(randn(rows, 64, 128))
    w = randn(rows, 64, dtype=torch.float32) * 0.011
    table = random_table(seqs, blocks, pool.shape[0])
    row_seq = torch.arange(rows, device="cuda") * seqs // rows
    return q, w, pool, shape, table, row_seq, torch.full((rows,), width, device="cuda")


def score_cases() -> Iterator[Case]:
    """Scores into a given buffer (``index_score`` itself reads its width back), and with selection."""

    def score(rows: int, seqs: int, width: int) -> Timed:
        args = score_inputs(rows, seqs, width)
        into = library.module("kernels.index_score.cuda_impl").score_into
        out = torch.empty(rows, width, device="cuda")
        one = seqs == 1 and rows >= 1024
        return Timed(
            calls=[lambda: into(out, *args, fill=True)],
            library=library.index_scores(*args) if one else (),
        )

    def chosen(rows: int, seqs: int, width: int) -> Timed:
        op, args = own("index_topk"), score_inputs(rows, seqs, width)
        return Timed(calls=[lambda: op(*args, 512)])

    for rows, seqs, width in [
        (4096, 1, 8192),
        (4096, 1, 32768),
        (1, 1, 32768),
        (32, 32, 2048),
        (32, 32, 32768),
        (128, 32, 32768),
        (4096, 1, 131072),
    ]:
        flops = 2.0 * rows * width * 64 * 128
        keys = seqs * width * INDEX_BYTES + rows * 64 * 260.0
        shape = f"{rows} rows, {seqs} sequences of {width}"
        if width <= 32768:  # longer ones are scored only where they are selected from
            yield Case(
                op="index_score",
                shape=shape,
                make=partial(score, rows, seqs, width),
                flops=flops,
                peak=FP8_TFLOPS,
                moved=keys + rows * width * 4.0,
                library=DEEP_GEMM,
            )
        yield Case(
            op="index_topk",
            shape=f"{shape}, k 512",
            make=partial(chosen, rows, seqs, width),
            flops=flops,
            peak=FP8_TFLOPS,
            moved=keys + rows * 2048.0,
        )


def prefill_cases() -> Iterator[Case]:
    """Window rows and entries of one sequence."""

    def attend(rows: int, heads: int, context: int, picked: int | None) -> Timed:
        op = own("sparse_attention")
        q, window = randn(rows, heads, 512), causal_rows(rows, 128, before=128)
        sink = randn(heads, dtype=torch.float32)
        entries = None
        if context:
            entries = random_entries(
                rows, seqs=1, blocks=context // 64, per_page=64, topk=picked, full=True
            )
        return Timed(
            calls=[lambda: op(q, window, entries, sink=sink, scale=SCALE)],
            library=library.sparse_prefill(q, window, entries, sink, SCALE),
        )

    for name, rows, heads, context, picked in [
        ("CSA", 4096, 64, 8192, 512),
        ("CSA", 2048, 128, 8192, 1024),
        ("CSA", 4096, 16, 8192, 512),
        ("HCA", 4096, 64, 256, None),
        ("HCA", 4096, 64, 1024, None),
        ("HCA", 1024, 64, 8192, None),
        ("window", 4096, 64, 0, None),
    ]:
        keys = 128 + (context if picked is None else picked)
        yield Case(
            op="sparse_attention",
            shape=f"prefill {name}: {rows} rows, {heads} heads, 128 + {keys - 128} of {context}",
            make=partial(attend, rows, heads, context, picked),
            flops=4.0 * rows * heads * keys * 512,
            moved=rows * heads * 2052.0 + rows * 1024.0 + context * ENTRY_BYTES,
            library=FLASH_MLA,
        )


def decode_cases() -> Iterator[Case]:
    """A ring of 128 and entries of one sequence per row; the chosen entries move from call to call."""

    def attend(rows: int, heads: int, context: int, picked: int | None) -> Timed:
        op = own("sparse_attention")
        q, ring = randn(rows, heads, 512), random_ring(rows, 128, CacheDtype.FP8, full=True)
        sink = torch.zeros(heads, device="cuda")
        chosen: list[EntryPages | None] = [None]
        if context:
            base = random_entries(
                rows, seqs=rows, blocks=context // 64, per_page=64, topk=picked, full=True
            )
            chosen = [base] * 4
            if base.index is not None:
                chosen = [
                    dataclasses.replace(base, index=(base.index + 37 * i) % context)
                    for i in range(8)
                ]

        def through(function: Any) -> list[Any]:
            return [partial(function, q, ring, e, sink=sink, scale=SCALE) for e in chosen]

        return Timed(
            calls=through(op),
            library=library.sparse_decode(q, ring, chosen, sink, SCALE),
            backends=library.served_attention(through, q, ring, chosen[0], SCALE),
        )

    for name, rows, heads, context, picked in [
        ("CSA", 32, 64, 8192, 512),
        ("CSA", 128, 64, 8192, 512),
        ("CSA", 8, 64, 8192, 512),
        ("CSA", 1, 64, 8192, 512),
        ("CSA", 32, 16, 8192, 512),
        ("CSA", 8, 16, 8192, 512),
        ("CSA", 1, 16, 8192, 512),
        ("CSA", 32, 128, 8192, 1024),
        ("HCA", 32, 64, 64, None),
        ("HCA", 32, 64, 1024, None),
        ("HCA", 1, 64, 8192, None),
        ("window", 32, 64, 0, None),
    ]:
        keys = 128 + (context if picked is None else picked)
        yield Case(
            op="sparse_attention",
            shape=f"decode {name}: {rows} rows, {heads} heads, 128 + {keys - 128} of {context}",
            make=partial(attend, rows, heads, context, picked),
            flops=4.0 * rows * heads * keys * 512,
            moved=rows * (keys * ENTRY_BYTES + heads * 2048.0),
            library=FLASH_MLA,
        )


def merge_cases() -> Iterator[Case]:
    """Partial results of four ranks, and of more in one step."""

    def merge(parts: int, rows: int) -> Timed:
        op = own("merge_lse")

        def one() -> Any:
            lse = randn(parts, rows, 64, dtype=torch.float32)
            return partial(op, randn(parts, rows, 64, 512), lse)

        return Timed(calls=sets(parts * rows * 65536.0, one))

    for parts, rows in [(4, 1), (4, 32), (5, 128), (4, 4096)]:
        yield Case(
            op="merge_lse",
            shape=f"{parts} x {rows} x 64 x 512",
            make=partial(merge, parts, rows),
            moved=(parts + 1) * rows * 65536.0,
        )
