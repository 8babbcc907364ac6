"""``compress_decode`` against the ops it joins, step by step over whole sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import (
    CacheDtype,
    CompressPart,
    EntryKind,
    KernelContractError,
    PageLayout,
    compress,
    compress_decode,
    round_entries,
    store_entries,
)
from kernels.page_cache.reference import load_entries
from tests.helpers.strided import column_slice, microseconds
from tests.kernels.oracle64 import frequencies

EPS, POOL_SLOTS = 1e-6, 30


def layout(kind: EntryKind, dim: int, cache: CacheDtype) -> PageLayout:
    rope_dim = 0 if kind is EntryKind.INDEX else 64
    return PageLayout(kind=kind, dtype=cache, head_dim=dim, rope_dim=rope_dim, entries_per_page=3)


def part(ratio: int, kind: EntryKind, dim: int, cache: CacheDtype, rows: int) -> CompressPart:
    pages = layout(kind, dim, cache)
    return CompressPart(
        ape=torch.randn(ratio, dim * (2 if ratio == 4 else 1)),
        norm_weight=torch.randn(dim),
        pool=torch.full((POOL_SLOTS // 3, pages.page_bytes), 7, dtype=torch.uint8),
        layout=pages,
        slots=torch.full((rows,), -1, dtype=torch.int64),
    )


def parts_of(ratio: int, cache: CacheDtype, rows: int = 0) -> tuple[CompressPart, ...]:
    main = part(ratio, EntryKind.LATENT, 128, cache, rows)
    if ratio == 128:
        return (main,)
    return (main, part(ratio, EntryKind.INDEX, 64, cache, rows))


def whole_rows(raw: Tensor, parts: tuple[CompressPart, ...], positions: Tensor) -> Tensor:
    """Rows with ape added, in float64 where raw is."""
    out, column = raw.clone(), 0
    for p in parts:
        half = p.width // 2
        gate = slice(column + half, column + p.width)
        out[:, gate] += p.ape.to(raw.dtype)[positions % p.ape.shape[0]]
        column += p.width
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize("ratio", [4, 128])
def test_steps_give_the_entries_of_the_whole_sequence(
    ratio: int, cache: CacheDtype, dtype: torch.dtype
) -> None:
    """Sequences advance by 1..4 rows a step, padded; entries equal those pooled from all rows at once."""
    ring, lengths = (16, (23, 9, 30)) if ratio == 4 else (256, (140, 129, 3))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    parts = parts_of(ratio, cache)
    width = sum(p.width for p in parts)
    raw = [torch.randn(n, width, dtype=wide) for n in lengths]
    state = torch.full((4 * ring, width), float("nan"))
    # The rings of prefixes: HCA starts near its group's end, for speed.
    done = [0 if ratio == 4 else max(0, n - 20) for n in lengths]
    for s, (rows, first) in enumerate(zip(raw, done, strict=True)):
        at = torch.arange(first)
        state[(s + 1) * ring + at % ring] = whole_rows(rows[:first], parts, at).float()
    step = 0
    while any(a < n for a, n in zip(done, lengths, strict=True)):
        step += 1
        positions: list[int] = []
        seq: list[int] = []
        base: list[int] = []
        slots: list[int] = []
        chosen: list[Tensor] = []
        for s, n in enumerate(lengths):
            take = min((step + s) % 4 + 1, n - done[s])
            for j in range(4):
                real = j < take
                position = done[s] + j if real else 0
                positions.append(position)
                seq.append(s)
                base.append((s + 1) * ring if real else -1)
                chosen.append(raw[s][position])
                ends = real and (position + 1) % ratio == 0 and s != 2
                slots.append(10 * s + position // ratio if ends else -1)
            done[s] += take
        now = tuple(replace(p, slots=torch.tensor(slots)) for p in parts)
        compress_decode(
            column_slice(torch.stack(chosen))
            if dtype is not torch.float64
            else torch.stack(chosen),
            state,
            now,
            torch.tensor(positions),
            torch.tensor(seq),
            torch.tensor(base),
            ratio=ratio,
            ring_rows=ring,
            inv_freq=frequencies(64),
            eps=EPS,
            quantize=True,
            dtype=dtype,
        )
    column = 0
    back = 8 if ratio == 4 else 128
    for p in parts:
        want_pool = torch.full_like(p.pool, 7)
        for s, n in enumerate(lengths[:2]):
            kept = whole_rows(raw[s], parts, torch.arange(n)).float()
            starts = torch.arange(n // ratio) * ratio
            index = starts[:, None] + ratio - back + torch.arange(back)
            made = compress(
                kept[:, column : column + p.width],
                index.clamp(min=-1),
                p.norm_weight,
                starts,
                frequencies(64),
                EPS,
                ratio=ratio,
                index=p.index,
                quantize=True,
                dtype=dtype,
            )
            places = 10 * s + torch.arange(n // ratio)
            store_entries(want_pool, p.layout, places, made)
            got = load_entries(p.pool, p.layout, places, dtype)
            assert torch.equal(got, round_entries(made, p.layout))
        assert torch.equal(p.pool, want_pool)
        column += p.width
    for s, n in enumerate(lengths):
        end = torch.arange(max(0, n - ring), n)
        kept = whole_rows(raw[s][end], parts, end).float()
        assert torch.equal(state[(s + 1) * ring + end % ring], kept)
    assert bool(state[:ring].isnan().all())


def arguments(ratio: int = 4) -> dict[str, Any]:
    parts = parts_of(ratio, CacheDtype.FP8, 3)
    width = sum(p.width for p in parts)
    return {
        "rows": torch.randn(3, width),
        "state": torch.zeros(64, width),
        "parts": parts,
        "positions": torch.tensor([6, 7, 0]),
        "seq": torch.tensor([0, 0, 0]),
        "state_base": torch.tensor([16, 16, -1]),
        "ratio": ratio,
        "ring_rows": 16,
        "inv_freq": frequencies(64),
        "eps": EPS,
        "quantize": True,
        "dtype": torch.bfloat16,
    }


def test_no_rows_and_padding_do_nothing() -> None:
    args = arguments()
    for name in ("rows", "positions", "seq", "state_base"):
        args[name] = args[name][:0]
    args["parts"] = tuple(replace(p, slots=p.slots[:0]) for p in args["parts"])
    compress_decode(**args)
    assert not args["state"].any()
    args = arguments() | {"state_base": torch.tensor([-1, -1, -1])}
    args["rows"][:] = float("nan")
    compress_decode(**args)
    assert not args["state"].any()
    assert all(bool((p.pool == 7).all()) for p in args["parts"])


def test_contract() -> None:
    args = arguments()
    with pytest.raises(KernelContractError, match="ratio 8, allowed: 4, 128"):
        compress_decode(**args | {"ratio": 8})
    with pytest.raises(KernelContractError, match="dtype torch"):
        compress_decode(**args | {"dtype": torch.float16})
    with pytest.raises(KernelContractError, match="parts: expected one or more"):
        compress_decode(**args | {"parts": ()})
    with pytest.raises(KernelContractError, match="ring_rows: 7, but an entry pools 8"):
        compress_decode(**args | {"ring_rows": 7})
    with pytest.raises(KernelContractError, match=r"rows: expected shape \[any, 768\]"):
        compress_decode(**args | {"rows": args["rows"][:, :700]})
    with pytest.raises(KernelContractError, match="state: expected float32"):
        compress_decode(**args | {"state": args["state"].double()})
    with pytest.raises(KernelContractError, match="seq: expected shape"):
        compress_decode(**args | {"seq": args["seq"][:2]})
    short = replace(args["parts"][0], ape=args["parts"][0].ape[:2])
    with pytest.raises(KernelContractError, match=r"ape: expected shape \[4, 256\]"):
        compress_decode(**args | {"parts": (short, args["parts"][1])})
    with pytest.raises(KernelContractError, match="outside the state's 64 rows"):
        compress_decode(**args | {"state_base": torch.tensor([49, 49, -1])})
    with pytest.raises(KernelContractError, match="must lie side by side"):
        compress_decode(**args | {"positions": torch.tensor([6, 8, 0])})
    with pytest.raises(KernelContractError, match="do not fit a ring of 8"):
        compress_decode(**args | {"ring_rows": 8})


@pytest.mark.benchmark
def test_speed() -> None:
    args = arguments()
    print(f"compress_decode 3 rows: {microseconds(lambda: compress_decode(**args)):.0f} us")
