"""Cases of the ops that fill and read pages: entries, latents, the compressor."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind
from tests.kernels.op_cases.base import (
    EPS,
    Case,
    Inputs,
    Make,
    Op,
    Rows,
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
