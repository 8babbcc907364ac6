"""Row ops around attention, the compressor, packed rows and sampling: shapes of V4-Flash and V4-Pro."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Timed, integers, own, randn, sets
from kernels import CacheDtype, CompressPart, EntryKind, PageLayout, RowCopy, RowStream
from kernels.row_exchange.api import stream_offsets

BF16, F32 = torch.bfloat16, torch.float32
EPS, FEW, MANY = 1e-6, (1, 8, 32), 16384
LATENT, INDEX = 584, 132  # bytes of an fp8 entry
POOLED = {"csa": (4, 8, 512, 2048), "index": (4, 8, 128, 512), "hca": (128, 128, 512, 1024)}
VOCAB = 129280


def cases() -> Iterator[Case]:
    """Every case, few rows first."""
    for rows in (*FEW, MANY):
        yield from _prologue(rows)
        yield from _parts(rows)
        for kind in POOLED:
            yield _compress(rows, kind)
    for rows in FEW:
        for ratio in (4, 128):
            for ends in (True, False):
                yield _decode(rows, ratio, ends=ends)
    yield from _exchange()
    yield from _copies()
    yield from _sampling()


def _case(op: str, shape: str, moved: float, held: float, make: Callable[[], Call]) -> Case:
    return Case(op=op, shape=shape, moved=moved, make=lambda: Timed(calls=sets(held, make)))


def _pages(kind: EntryKind, rows: int) -> tuple[Tensor, PageLayout, Tensor]:
    """An fp8 pool with room for ``rows`` entries, and their slots."""
    index = kind is EntryKind.INDEX
    layout = PageLayout(
        kind=kind,
        dtype=CacheDtype.FP8,
        head_dim=128 if index else 512,
        rope_dim=0 if index else 64,
        entries_per_page=64,
    )
    pool = integers(100, -(-rows // 64) + 1, layout.page_bytes).to(torch.uint8)
    return pool, layout, torch.arange(rows, device="cuda")


def _freq() -> Tensor:
    return torch.rand(32, device="cuda")


def _prologue(t: int) -> Iterator[Case]:
    for heads, index_heads in ((16, 0), (64, 64), (128, 64)):

        def make(heads: int = heads, index_heads: int = index_heads) -> Call:
            q = randn(t, heads * 512).view(t, heads, 512)
            kv = randn(t, 1536 + 512)[:, 1536:]
            index = randn(t, index_heads * 128).view(t, index_heads, 128) if index_heads else None
            weight, at, freq = randn(512), integers(1 << 20, t), _freq()
            pool, layout, slots = _pages(EntryKind.LATENT, t)
            run = own("qkv_norm_rope")
            return lambda: run(
                q,
                kv,
                weight,
                at,
                freq,
                EPS,
                pool,
                layout,
                slots,
                quantize=True,
                index_q=index,
            )

        moved = t * (heads * 2048 + 2048 + LATENT + index_heads * 512)
        shape = f"{t} tokens, {heads} heads" + (" and the indexer's" if index_heads else "")
        yield _case("qkv_norm_rope", shape, moved, moved, make)


def _parts(t: int) -> Iterator[Case]:
    """The ops one by one."""

    def q() -> Call:
        x, at, freq, run = randn(t, 64, 512), integers(1 << 20, t), _freq(), own("q_norm_rope")
        return lambda: run(x, at, freq, EPS)

    def inverse() -> Call:
        x, at, freq, run = randn(t, 64, 512), integers(1 << 20, t), _freq(), own("apply_rope")
        return lambda: run(x, at, freq, True)

    def index() -> Call:
        x, at, freq, run = randn(t, 64, 128), integers(1 << 20, t), _freq(), own("index_query")
        return lambda: run(x, at, freq, quantize=True)

    def kv() -> Call:
        x, w, at, freq = randn(t, 512), randn(512), integers(1 << 20, t), _freq()
        run = own("kv_norm_rope")
        return lambda: run(x, w, at, freq, EPS, quantize=True)

    def insert() -> Call:
        x, w, at, freq = randn(t, 512), randn(512), integers(1 << 20, t), _freq()
        pages, run = _pages(EntryKind.LATENT, t), own("kv_insert")
        return lambda: run(x, w, at, freq, EPS, *pages, quantize=True)

    def store() -> Call:
        x, run = randn(t, 512), own("store_entries")
        pool, layout, slots = _pages(EntryKind.LATENT, t)
        return lambda: run(pool, layout, slots, x)

    def load() -> Call:
        (pool, layout, slots), run = _pages(EntryKind.LATENT, t), own("load_entries")
        return lambda: run(pool, layout, slots, BF16)

    row = t * 1024
    for op, shape, moved, make in (
        ("q_norm_rope", f"{t}x64x512", 128 * row, q),
        ("apply_rope", f"{t}x64x512 inverse", 128 * row, inverse),
        ("index_query", f"{t}x64x128", 32 * row, index),
        ("kv_norm_rope", f"{t}x512", 2 * row, kv),
        ("kv_insert", f"{t}x512 fp8", 2 * row + t * LATENT, insert),
        ("store_entries", f"{t}x512 fp8", row + t * LATENT, store),
        ("load_entries", f"{t}x512 fp8", row + t * LATENT, load),
    ):
        yield _case(op, shape, moved, moved, make)


def _compress(t: int, kind: str) -> Case:
    """Entries of ``t`` token rows in a chunk; ``t`` entries where rows are few."""
    ratio, slots, dim, width = POOLED[kind]
    entries = t // ratio if t == MANY else t
    tokens = entries * ratio + slots

    def make() -> Call:
        rows = randn(tokens, width, dtype=F32)
        first = torch.arange(entries, device="cuda")[:, None] * ratio
        pages = _pages(EntryKind.INDEX if kind == "index" else EntryKind.LATENT, entries)
        args = (rows, first + torch.arange(slots, device="cuda"), randn(dim), first[:, 0])
        args, freq, run = (*args[:3], args[3].contiguous()), _freq(), own("compress_insert")
        return lambda: run(*args, freq, EPS, *pages, ratio=ratio, quantize=True, dtype=BF16)

    # HCA entries share no rows; a CSA entry shares its first four with the entry before.
    moved = entries * (ratio * width * 4 + slots * 8 + (INDEX if kind == "index" else LATENT))
    shape = f"{kind}: {entries} entries of {slots}x{width}"
    return _case("compress_insert", shape, moved, tokens * width * 4, make)


def _decode(t: int, ratio: int, *, ends: bool) -> Case:
    """A decode step of ``t`` sequences whose rows all complete an entry, or none does."""
    kinds = ("csa", "index") if ratio == 4 else ("hca",)
    width = sum(POOLED[k][3] for k in kinds)
    ring = 16 if ratio == 4 else 256

    def make() -> Call:
        rows = randn(t, width + 512, dtype=F32)[:, 512:]
        state = randn(t * ring, width, dtype=F32)
        at = integers(1 << 12, t) * ratio + 1000 * ratio - (1 if ends else 2)
        seq = torch.arange(t, device="cuda")
        base = seq * ring
        parts = []
        for kind in kinds:
            _, _, dim, part_width = POOLED[kind]
            pool, layout, slots = _pages(
                EntryKind.INDEX if kind == "index" else EntryKind.LATENT, t
            )
            ape = randn(ratio, part_width // 2, dtype=F32)
            parts.append(
                CompressPart(ape=ape, norm_weight=randn(dim), pool=pool, layout=layout, slots=slots)
            )
        freq, run, made = _freq(), own("compress_decode"), tuple(parts)
        return lambda: run(
            rows,
            state,
            made,
            at,
            seq,
            base,
            ratio=ratio,
            ring_rows=ring,
            inv_freq=freq,
            eps=EPS,
            quantize=True,
            dtype=BF16,
        )

    pooled = 8 * width // 2 if ratio == 4 else 128 * width
    moved = t * 4 * (2 * width + (pooled if ends else 0))
    shape = f"ratio {ratio}, {t} rows, " + ("all end a group" if ends else "none ends a group")
    return _case("compress_decode", shape, moved, t * ring * width * 4, make)


def _exchange() -> Iterator[Case]:
    """A CSA layer's window latents and compressor rows of one of four ranks."""
    ranks, local, halo = 4, 16384, 4096

    def streams() -> tuple[RowStream, ...]:
        counts = (halo,) * ranks
        ring, state = randn(128, 512), randn(16, 2560, dtype=F32)
        return (
            RowStream(local=randn(local, 512), counts=counts, send=_pick(), carried=ring),
            RowStream(
                local=randn(local, 2560, dtype=F32), counts=counts, send=_pick(), carried=state
            ),
        )

    def _pick() -> Tensor:
        return torch.arange(halo, device="cuda") + integers(local - halo, 1)

    def pack() -> Call:
        made, run = streams(), own("pack_rows")
        return lambda: run(made)

    def unpack() -> Call:
        made, run = streams(), own("unpack_rows")
        received = integers(100, ranks * stream_offsets(made)[-1] // 8).view(torch.uint8)
        return lambda: run(received, made)

    row = 1024 + 10240
    shape = f"{local} local rows of 512 bf16 and 2560 f32, {halo} sent"
    yield _case("pack_rows", shape, 2 * halo * row, local * row, pack)
    yield _case("unpack_rows", shape, 2 * (local + ranks * halo) * row, local * row, unpack)


def _copies() -> Iterator[Case]:
    """Rows on their way to the experts: codes, scales, weights and ids side by side."""
    rows, widths = 16384, (4096, 32, 24, 48)

    def make() -> Call:
        wire = torch.empty(rows, 4208, dtype=torch.uint8, device="cuda")
        copies, at = [], 0
        for width in widths:
            source = integers(1 << 40, rows * width // 8).view(torch.uint8).view(rows, width)
            copies.append(RowCopy(source=source, target=wire[:, at : at + width]))
            at += -(-width // 16) * 16
        run = own("copy_rows")
        return lambda: run(tuple(copies))

    size = rows * sum(widths)
    yield _case("copy_rows", f"{rows} routed rows of 4096 codes", 2 * size, size, make)


def _sampling() -> Iterator[Case]:
    for rows, columns in ((1, 32320), (32, 32320), (512, 32320), (1, VOCAB), (32, VOCAB)):

        def make(rows: int = rows, columns: int = columns) -> Call:
            logits, run = randn(rows, columns, dtype=F32) * 3, own("sample_partial")
            warmth, peak = torch.ones(rows, device="cuda"), logits.amax(-1)
            seeds, steps = integers(1 << 40, rows), integers(1000, rows)
            return lambda: run(
                logits, warmth, seeds, steps, vocab_offset=0, vocab_size=VOCAB, peak=peak
            )

        size = rows * columns * 4
        yield _case("sample_partial", f"{rows}x{columns}", size, size, make)

    for rows in (1, 32):

        def merge(rows: int = rows) -> Call:
            score, lse = randn(4, rows, dtype=F32), randn(4, rows, dtype=F32)
            ids, run = integers(VOCAB, 4, rows), own("merge_samples")
            return lambda: run(score, ids, lse)

        yield _case("merge_samples", f"4 ranks x {rows}", 64 * rows, 12 * rows, merge)

    def noise() -> Call:
        seeds, steps, run = integers(1 << 40, 32), integers(1000, 32), own("gumbel_noise")
        return lambda: run(seeds, steps, VOCAB, seeds.device)

    size = 32 * VOCAB * 4
    yield _case("gumbel_noise", f"32x{VOCAB}", size, size, noise)
