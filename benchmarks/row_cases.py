"""Memory-bound ops of a V4 layer on one GPU: this project's kernels against the copy bandwidth.

``python benchmarks/row_cases.py [--only OP ..] [--rows T ..] [--json FILE] [--compile I/N]``. A time is
that of one call inside a CUDA graph that walks over several sets of inputs and weights, so that none
is found in L2; random data. Bytes are the fewest an op can move: each input read once, each output
written once. ``--compile I/N`` only builds the I-th of N shares of the kernels, so that N processes
fill the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, PageLayout
from kernels.compress_insert import triton_impl as compress_insert
from kernels.gumbel import triton_impl as gumbel
from kernels.hc import cuda_impl as hc
from kernels.hc import reference as hc_reference
from kernels.hc_post_pre import cuda_impl as hc_post_pre
from kernels.index_query import triton_impl as index_query
from kernels.kv_insert import triton_impl as kv_insert
from kernels.kv_norm_rope import reference as kv_reference
from kernels.kv_norm_rope import triton_impl as kv_norm_rope
from kernels.moe_gate import reference as gate_reference
from kernels.moe_gate import triton_impl as moe_gate
from kernels.moe_permute import triton_impl as moe_permute
from kernels.page_cache import triton_impl as page_cache
from kernels.q_norm_rope import reference as q_reference
from kernels.q_norm_rope import triton_impl as q_norm_rope
from kernels.rms_norm import reference as rms_reference
from kernels.rms_norm import triton_impl as rms_norm
from kernels.rope import triton_impl as rope
from kernels.swiglu import reference as swiglu_reference
from kernels.swiglu import triton_impl as swiglu

COPY_TBPS = 4.27
ROTATE_BYTES = 256 << 20  # more than the L2 holds, several times
BF16, F32 = torch.bfloat16, torch.float32
CUDA_OPS = ("hc_pre", "hc_head", "hc_post_pre")
PRE = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
ROWS = (1, 8, 32, 128, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure, as benchmarks/results/*.json keeps it."""

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
    """One op at one shape: ``make`` builds a set of inputs and returns the call and the twin's."""

    op: str
    shape: str
    moved: int  # bytes of one call
    held: int  # bytes that one set of inputs keeps in memory
    make: Callable[[], tuple[Callable[[], object], Callable[[], object] | None]]


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, device="cuda")


def latent_pages(rows: int) -> tuple[Tensor, PageLayout, Tensor]:
    layout = PageLayout(
        kind=EntryKind.LATENT, dtype=CacheDtype.FP8, head_dim=512, rope_dim=64, entries_per_page=64
    )
    return (*_pages(layout, rows),)


def _pages(layout: PageLayout, rows: int) -> tuple[Tensor, PageLayout, Tensor]:
    count = -(-rows // layout.entries_per_page) + 1
    pool = torch.randint(0, 100, (count, layout.page_bytes), device="cuda", dtype=torch.uint8)
    return pool, layout, torch.arange(rows, device="cuda")


def index_pages(rows: int) -> tuple[Tensor, PageLayout, Tensor]:
    layout = PageLayout(
        kind=EntryKind.INDEX, dtype=CacheDtype.FP8, head_dim=128, rope_dim=0, entries_per_page=64
    )
    return _pages(layout, rows)


def cases(rows: Sequence[int]) -> Iterator[Case]:
    """Every case at these numbers of rows."""
    freq = torch.rand(32, device="cuda")
    for t in rows:
        big = t >= 4096
        for name, d, heads in (("flash", 4096, 64), ("pro", 7168, 128)):
            yield from _model_cases(t, name, d, heads, freq)
        at = integers(1 << 20, t)

        def kv(t: int = t, at: Tensor = at) -> tuple[Callable[[], object], Callable[[], object]]:
            x, w = randn(t, 512), randn(512)
            args = (x, w, at, freq, 1e-6)
            return (
                lambda: kv_norm_rope.kv_norm_rope(*args, quantize=True),
                lambda: kv_reference.kv_norm_rope(*args, quantize=True),
            )

        yield Case(op="kv_norm_rope", shape=f"{t}x512", moved=t * 2048, held=t * 2048, make=kv)

        def insert(t: int = t, at: Tensor = at) -> tuple[Callable[[], object], None]:
            x, w, pages = randn(t, 512), randn(512), latent_pages(t)
            return lambda: kv_insert.kv_insert(x, w, at, freq, 1e-6, *pages, quantize=True), None

        yield Case(
            op="kv_insert", shape=f"{t}x512", moved=t * (2048 + 584), held=t * 2700, make=insert
        )

        def store(t: int = t) -> tuple[Callable[[], object], None]:
            x, (pool, layout, slots) = randn(t, 512), latent_pages(t)
            return lambda: page_cache.store_entries(pool, layout, slots, x), None

        def load(t: int = t) -> tuple[Callable[[], object], None]:
            pool, layout, slots = latent_pages(t)
            return lambda: page_cache.load_entries(pool, layout, slots, BF16), None

        yield Case(
            op="store_entries", shape=f"{t}x512 fp8", moved=t * 1608, held=t * 1700, make=store
        )
        yield Case(
            op="load_entries", shape=f"{t}x512 fp8", moved=t * 1608, held=t * 1700, make=load
        )

        def iq(t: int = t, at: Tensor = at) -> tuple[Callable[[], object], None]:
            q = randn(t, 64, 128)
            return lambda: index_query.index_query(q, at, freq, quantize=True), None

        yield Case(op="index_query", shape=f"{t}x64x128", moved=t * 32768, held=t * 32768, make=iq)
        for kind in ("csa", "index", "hca"):
            yield from _compress_cases(t, kind, freq)
        if not big:

            def noise(t: int = t) -> tuple[Callable[[], object], None]:
                seeds, steps = integers(1 << 40, t), integers(1000, t)
                device = torch.device("cuda")
                return lambda: gumbel.gumbel_noise(seeds, steps, 129280, device), None

            size = t * 129280 * 4
            yield Case(op="gumbel_noise", shape=f"{t}x129280", moved=size, held=size, make=noise)


def _compress_cases(t: int, kind: str, freq: Tensor) -> Iterator[Case]:
    """``t`` token rows (t entries where that is fewer than one entry would take)."""
    ratio, slots, d, width = {
        "csa": (4, 8, 512, 2048), "index": (4, 8, 128, 512), "hca": (128, 128, 512, 1024),
    }[kind]  # fmt: skip
    entries = t // ratio if t >= 4096 else min(t, 32)
    tokens = entries * ratio + slots

    def make() -> tuple[Callable[[], object], None]:
        rows = randn(tokens, width, dtype=F32)
        first = torch.arange(entries, device="cuda")[:, None] * ratio
        index = first + torch.arange(slots, device="cuda")
        at, w = first[:, 0].contiguous(), randn(d)
        pages = index_pages(entries) if kind == "index" else latent_pages(entries)
        args = (rows, index, w, at, freq, 1e-6, *pages)
        return (
            lambda: compress_insert.compress_insert(*args, ratio=ratio, quantize=True, dtype=BF16),
            None,
        )

    # HCA entries share no rows; a CSA entry shares its first four with the entry before.
    moved = entries * (ratio * width * 4 + slots * 8 + (132 if kind == "index" else 584))
    shape = f"{kind} {entries} entries of {slots}x{width}"
    if t >= 4096 or t in (1, 8, 32):
        yield Case(
            op="compress_insert", shape=shape, moved=moved, held=tokens * width * 4, make=make
        )


def _model_cases(t: int, name: str, d: int, heads: int, freq: Tensor) -> Iterator[Case]:
    at = integers(1 << 20, t)
    if t * heads <= 65536 * 64:

        def q() -> tuple[Callable[[], object], Callable[[], object]]:
            x = randn(t, heads, 512)
            return (
                lambda: q_norm_rope.q_norm_rope(x, at, freq, 1e-6),
                lambda: q_reference.q_norm_rope(x, at, freq, 1e-6),
            )

        size = t * heads * 2048
        yield Case(op="q_norm_rope", shape=f"{t}x{heads}x512", moved=size, held=size, make=q)

        def inverse() -> tuple[Callable[[], object], None]:
            x = randn(t, heads, 512)
            return lambda: rope.apply_rope(x, at, freq, True), None

        if name == "flash":
            yield Case(
                op="apply_rope", shape=f"{t}x{heads}x512", moved=size, held=size, make=inverse
            )

    def norm() -> tuple[Callable[[], object], Callable[[], object]]:
        x, w = randn(t, d), randn(d)
        return lambda: rms_norm.rms_norm(x, w, 1e-6), lambda: rms_reference.rms_norm(x, w, 1e-6)

    yield Case(op="rms_norm", shape=f"{t}x{d}", moved=t * d * 4, held=t * d * 4, make=norm)
    inner = 2048 if name == "flash" else 3072

    def glu() -> tuple[Callable[[], object], Callable[[], object]]:
        g, u = randn(t, 2 * inner).chunk(2, 1)
        return (
            lambda: swiglu.swiglu(g, u, limit=10.0),
            lambda: swiglu_reference.swiglu(g, u, limit=10.0),
        )

    yield Case(op="swiglu", shape=f"{t}x{inner}", moved=t * inner * 6, held=t * inner * 6, make=glu)
    if t > 16384:
        return
    weights = 24 * 4 * d * 4

    def mix() -> tuple[Tensor, Tensor, Tensor]:
        return (
            randn(24, 4 * d, dtype=F32) * (4 * d) ** -0.5,
            randn(3, dtype=F32),
            randn(24, dtype=F32),
        )

    def pre() -> tuple[Callable[[], object], Callable[[], object]]:
        x, w = randn(t, 4, d), mix()
        return lambda: hc.hc_pre(x, *w, **PRE), lambda: hc_reference.hc_pre(x, *w, **PRE)

    def post() -> tuple[Callable[[], object], Callable[[], object]]:
        x, a, p, c = randn(t, 4, d), randn(t, d), randn(t, 4, dtype=F32), randn(t, 4, 4, dtype=F32)
        return lambda: hc.hc_post(a, x, p, c), lambda: hc_reference.hc_post(a, x, p, c)

    def both() -> tuple[Callable[[], object], None]:
        x, a, p, c = randn(t, 4, d), randn(t, d), randn(t, 4, dtype=F32), randn(t, 4, 4, dtype=F32)
        w = mix()
        return lambda: hc_post_pre.hc_post_pre(a, x, p, c, *w, **PRE), None

    def head() -> tuple[Callable[[], object], None]:
        x, (fn, scale, base) = randn(t, 4, d), mix()
        fn = fn[:4].contiguous()
        return lambda: hc.hc_head(x, fn, scale[:1], base[:4], eps=1e-6, norm_eps=1e-6), None

    row = t * d * 2
    shape = f"{t}x4x{d}"
    yield Case(op="hc_pre", shape=shape, moved=row * 5 + weights, held=row * 5 + weights, make=pre)
    yield Case(op="hc_post", shape=shape, moved=row * 9, held=row * 9, make=post)
    yield Case(
        op="hc_post_pre", shape=shape, moved=row * 10 + weights, held=row * 10 + weights, make=both
    )
    if name == "flash":
        size = row * 5 + weights // 6
        yield Case(op="hc_head", shape=shape, moved=size, held=size, make=head)
    experts = 256 if name == "flash" else 384

    def gate() -> tuple[Callable[[], object], Callable[[], object]]:
        x, w = randn(t, d), randn(experts, d) * d**-0.5
        kwargs = {"k": 6, "route_scale": 1.5, "bias": randn(experts, dtype=F32) * 0.1}
        return (
            lambda: moe_gate.moe_gate(x, w, **kwargs),
            lambda: gate_reference.moe_gate(x, w, **kwargs),
        )

    size = row + experts * d * 2 + t * 72
    yield Case(op="moe_gate", shape=f"{t}x{d}x{experts}", moved=size, held=size, make=gate)

    def permute() -> tuple[Callable[[], object], None]:
        x, w = randn(t, d), torch.rand(t, 6, device="cuda")
        ids = torch.rand(t, experts, device="cuda").argsort(1)[:, :6].sort(1).values
        first = experts // 4
        return (
            lambda: moe_permute.moe_permute(x, ids, w, first_expert=first, num_local=first),
            None,
        )

    def unpermute() -> tuple[Callable[[], object], None]:
        # A rank of four holds a quarter of the experts: 1.5 of 6 choices on average.
        rows, shared = randn(t * 6, d), randn(t, d)
        place = integers(t * 6, t, 6)
        place[integers(4, t, 6) > 0] = -1
        return lambda: moe_permute.moe_unpermute(rows, place, shared, BF16), None

    local = row * 3 // 2  # bytes of the rows that stay here, on average
    yield Case(
        op="moe_permute", shape=f"{t}x{d} ep4", moved=row + local, held=row * 7, make=permute
    )
    yield Case(
        op="moe_unpermute",
        shape=f"{t}x{d} ep4",
        moved=local + 2 * row,
        held=row * 8,
        make=unpermute,
    )


def graph_us(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds of one call, all of them replayed as one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, 24 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    graph.replay()
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def eager_us(call: Callable[[], object]) -> float:
    """Median microseconds of one call between two events."""
    call()
    times = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def measure(case: Case, date: str) -> Row:
    """Time a case, and its torch twin at 16,384 rows."""
    copies = max(1, min(64, ROTATE_BYTES // case.held))
    made = [case.make() for _ in range(copies)]
    us = graph_us([call for call, _ in made])
    twin = made[0][1]
    large = case.shape.startswith("16384x")
    library_us = eager_us(twin) if twin is not None and large else None
    tbps = case.moved / us / 1e6
    return Row(
        op=case.op,
        shape=case.shape,
        implementation="cuda" if case.op in CUDA_OPS else "triton",
        us=round(us, 2),
        tflops=None,
        tbps=round(tbps, 3),
        share_of_limit=round(tbps / COPY_TBPS, 3),
        library="torch eager" if library_us is not None else None,
        library_us=None if library_us is None else round(library_us, 1),
        hardware=torch.cuda.get_device_name(),
        date=date,
    )


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", default="")
    parser.add_argument("--date", default="")
    args = parser.parse_args()
    chosen = [c for c in cases(args.rows) if not args.only or c.op in args.only]
    if args.compile:
        share, shares = (int(n) for n in args.compile.split("/"))
        for case in chosen[share::shares]:
            case.make()[0]()
            torch.cuda.synchronize()
        return
    rows = []
    for case in chosen:
        row = measure(case, args.date)
        torch.cuda.empty_cache()
        rows.append(row)
        library = "" if row.library_us is None else f"  torch {row.library_us:9.1f}"
        print(
            f"{row.op:16s} {row.shape:34s} {row.us:9.2f} us {row.tbps:6.3f} TB/s"
            f" {100 * row.share_of_limit:5.1f} %{library}",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
