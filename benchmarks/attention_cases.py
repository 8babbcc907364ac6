"""Attention ops on one GPU: index score, top-k, sparse attention, lse merge.

``python -m benchmarks.attention_cases [--group NAME ...] [--json FILE]``. Times are those of one call inside
a CUDA graph of several calls on different inputs, median of replays; random data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, EntryPages
from kernels.index_score import cuda_impl as index_score
from kernels.index_topk import cuda_impl as index_topk
from kernels.merge_lse import cuda_impl as merge
from kernels.quant.reference import fake_quant_fp4
from kernels.sparse_attention import cuda_impl as attention
from kernels.topk import cuda_impl as topk
from tests.kernels.attention_gpu import (
    causal_rows,
    layout,
    random_entries,
    random_pool,
    random_ring,
    random_table,
)

BF16_TFLOPS, FP8_TFLOPS, COPY_TBPS = 790.0, 1580.0, 4.27  # limits, see docs/kernels-gpu.md
ENTRY_BYTES, INDEX_BYTES = 584, 132
SCALE = 512**-0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure."""

    op: str
    shape: str
    implementation: str
    us: float
    tflops: float | None
    tbps: float | None
    share_of_limit: float
    library: str | None
    library_us: float | None
    hardware: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to time: ``calls`` on different inputs, and the work of one of them."""

    op: str
    shape: str
    calls: list[Callable[[], object]]
    flops: float = 0.0
    peak_tflops: float = BF16_TFLOPS
    moved_bytes: float = 0.0
    library: str | None = None
    library_call: Callable[[], object] | None = None


def graph_time(calls: list[Callable[[], object]], replays: int = 9) -> float:
    """Microseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls[0]()
    start.record()
    calls[0]()
    end.record()
    end.synchronize()
    if start.elapsed_time(end) < 1.0:  # short calls: enough of them to hide the graph's own start
        calls = calls * max(1, 16 // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def measure(case: Case, hardware: str) -> Row:
    us = graph_time(case.calls)
    limit = max(
        case.flops / case.peak_tflops / 1e6,
        case.moved_bytes / COPY_TBPS / 1e6,
    )
    library_us = None
    if case.library_call is not None:
        library_us = round(graph_time([case.library_call]), 2)
    return Row(
        op=case.op,
        shape=case.shape,
        implementation="cuda",
        us=round(us, 2),
        tflops=round(case.flops / us / 1e6, 1) if case.flops else None,
        tbps=round(case.moved_bytes / us / 1e6, 3) if case.moved_bytes else None,
        share_of_limit=round(limit / us, 3),
        library=case.library,
        library_us=library_us,
        hardware=hardware,
        date=datetime.now(UTC).date().isoformat(),
    )


def topk_cases() -> Iterator[Case]:
    for rows, columns, k in [
        (1024, 65536, 512),
        (1024, 65536, 1024),
        (1024, 8192, 512),
        (1, 262144, 512),
        (8, 262144, 512),
        (32, 65536, 512),
        (128, 16384, 512),
    ]:
        sets = 1 if rows == 1024 else 4
        inputs = [torch.randn(rows, columns + 256, device="cuda")[:, :columns] for _ in range(sets)]
        yield Case(
            op="topk_select",
            shape=f"{rows} x {columns}, k {k}",
            calls=[lambda x=x, k=k: topk.topk_select(x, k) for x in inputs],
            moved_bytes=rows * columns * 4.0,
            library="torch.topk",
            library_call=lambda x=inputs[0], k=k: torch.topk(x, k, dim=1),
        )
    values = torch.randn(128, 2048, device="cuda")
    indices = torch.rand(128, 2048, device="cuda").argsort(dim=1).to(torch.int32)
    yield Case(
        op="topk_merge",
        shape="128 x 2048, k 512",
        calls=[lambda: topk.topk_merge(values, indices, 512)],
        moved_bytes=values.numel() * 8.0,
    )


def score_inputs(rows: int, seqs: int, width: int) -> tuple[Tensor, ...]:
    blocks = width // 64
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, 64)
    pool = random_pool(shape, seqs * blocks)
    q = fake_quant_fp4(torch.randn(rows, 64, 128, device="cuda").to(torch.bfloat16))
    w = torch.randn(rows, 64, device="cuda") * 0.011
    table = random_table(seqs, blocks, pool.shape[0])
    row_seq = torch.arange(rows, device="cuda") * seqs // rows
    return q, w, pool, table, row_seq, torch.full((rows,), width, device="cuda")


def score_cases() -> Iterator[Case]:
    shape = layout(EntryKind.INDEX, CacheDtype.FP8, 64)
    for rows, seqs, width in [
        (4096, 1, 8192),
        (4096, 1, 32768),
        (1, 1, 32768),
        (32, 32, 2048),
        (32, 32, 32768),
        (128, 32, 32768),
    ]:
        q, w, pool, table, row_seq, num = score_inputs(rows, seqs, width)
        out = torch.empty(rows, width, device="cuda")
        yield Case(
            op="index_score",
            shape=f"{rows} rows, {seqs} sequences of {width}",
            calls=[
                lambda a=(out, q, w, pool, shape, table, row_seq, num): index_score.score_into(
                    *a, fill=True
                )
            ],
            flops=2.0 * rows * width * 64 * 128,
            peak_tflops=FP8_TFLOPS,
            moved_bytes=float(seqs * width * INDEX_BYTES + rows * width * 4),
        )
        yield Case(
            op="index_topk",
            shape=f"{rows} rows, {seqs} sequences of {width}, k 512",
            calls=[
                lambda a=(q, w, pool, shape, table, row_seq, num, 512): index_topk.index_topk(*a)
            ],
            flops=2.0 * rows * width * 64 * 128,
            peak_tflops=FP8_TFLOPS,
        )


def prefill_cases() -> Iterator[Case]:
    for name, rows, heads, context, picked in [
        ("CSA", 4096, 64, 8192, 512),
        ("CSA", 2048, 128, 8192, 1024),
        ("CSA", 4096, 16, 8192, 512),
        ("HCA", 4096, 64, 256, None),
        ("HCA", 4096, 64, 1024, None),
        ("HCA", 1024, 64, 8192, None),
        ("window", 4096, 64, 0, None),
    ]:
        q = torch.randn(rows, heads, 512, device="cuda", dtype=torch.bfloat16)
        window, sink = causal_rows(rows, 128, before=128), torch.randn(heads, device="cuda")
        entries = None
        if context:
            entries = random_entries(
                rows, seqs=1, blocks=context // 64, per_page=64, topk=picked, full=True
            )
        keys = 128 + (context if picked is None else picked)
        yield Case(
            op="sparse_attention prefill",
            shape=f"{name}: {rows} rows, {heads} heads, 128 + {keys - 128} of {context}",
            calls=[
                lambda a=(q, window, entries), s=sink: attention.sparse_attention(
                    *a, sink=s, scale=SCALE
                )
            ],
            flops=4.0 * rows * heads * keys * 512,
        )


def decode_cases() -> Iterator[Case]:
    for name, rows, heads, context, picked in [
        ("CSA", 32, 64, 8192, 512),
        ("CSA", 128, 64, 8192, 512),
        ("CSA", 1, 64, 8192, 512),
        ("CSA", 32, 16, 8192, 512),
        ("CSA", 32, 128, 8192, 1024),
        ("HCA", 32, 64, 64, None),
        ("HCA", 32, 64, 1024, None),
        ("HCA", 1, 64, 8192, None),
        ("window", 32, 64, 0, None),
    ]:
        q = torch.randn(rows, heads, 512, device="cuda", dtype=torch.bfloat16)
        ring, sink = random_ring(rows, 128, CacheDtype.FP8, full=True), torch.zeros(heads).cuda()
        sets: list[EntryPages | None] = [None]
        if context:
            base = random_entries(
                rows,
                seqs=rows,
                blocks=context // 64,
                per_page=64,
                topk=picked,
                full=True,
            )
            sets = [base] * 4
            if base.index is not None:
                sets = [
                    dataclasses.replace(base, index=(base.index + 37 * i) % context)
                    for i in range(8)
                ]
        keys = 128 + (context if picked is None else picked)
        yield Case(
            op="sparse_attention decode",
            shape=f"{name}: {rows} rows, {heads} heads, 128 + {keys - 128} of {context}",
            calls=[
                lambda e=e, a=(q, ring), s=sink: attention.sparse_attention(
                    *a, e, sink=s, scale=SCALE
                )
                for e in sets
            ],
            flops=4.0 * rows * heads * keys * 512,
            moved_bytes=rows * (keys * ENTRY_BYTES + heads * 2048.0),
        )


def merge_cases() -> Iterator[Case]:
    for parts, rows in [(4, 1), (4, 32), (5, 128), (4, 4096)]:
        sets = 1 if rows > 128 else 4
        inputs = [
            (
                torch.randn(parts, rows, 64, 512, device="cuda", dtype=torch.bfloat16),
                torch.randn(parts, rows, 64, device="cuda"),
            )
            for _ in range(sets)
        ]
        yield Case(
            op="merge_lse",
            shape=f"{parts} x {rows} x 64 x 512",
            calls=[lambda x=x: merge.merge_lse(*x) for x in inputs],
            moved_bytes=(parts + 1) * rows * 64 * 1024.0,
        )


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "topk": topk_cases,
    "score": score_cases,
    "prefill": prefill_cases,
    "decode": decode_cases,
    "merge": merge_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    hardware, rows = torch.cuda.get_device_name(), []
    for group in options.group:
        for case in GROUPS[group]():
            row = measure(case, hardware)
            rows.append(asdict(row))
            print(
                f"{row.op:26} {row.shape:48} {row.us:10.1f} us {row.tflops or 0:7.1f} TF/s"
                f" {row.tbps or 0:6.3f} TB/s {row.share_of_limit:6.1%}"
                f"  {row.library or ''} {row.library_us or ''}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
