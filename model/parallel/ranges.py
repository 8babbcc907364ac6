"""Ranges of token rows and the arithmetic on them that ``partition`` is made of.

Positions are absolute, ``end`` is exclusive, ``request`` is the index of the chunk in the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Table = Mapping[int, Sequence[tuple[int, int, int]]]  # request -> (start, end, offset of start)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's tokens of this step: positions ``start .. end - 1``."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous part of a request's chunk that one rank computes."""

    request: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows ``start .. end - 1`` of one request in a row stream."""

    request: int
    start: int
    end: int


def merge(ranges: Iterable[Segment | RowRange]) -> tuple[RowRange, ...]:
    """The same rows as ordered, disjoint, non-adjacent ranges."""
    out: list[RowRange] = []
    for r in sorted(ranges, key=lambda r: (r.request, r.start)):
        if r.start >= r.end:
            continue
        if out and out[-1].request == r.request and r.start <= out[-1].end:
            out[-1] = RowRange(r.request, out[-1].start, max(out[-1].end, r.end))
        else:
            out.append(RowRange(r.request, r.start, r.end))
    return tuple(out)


def intersect(
    parts: Iterable[Segment | RowRange], kept: Iterable[RowRange]
) -> tuple[RowRange, ...]:
    """Those rows of ``parts``, in their order, that lie in the merged ranges ``kept``."""
    by_request: dict[int, list[RowRange]] = {}
    for r in kept:
        by_request.setdefault(r.request, []).append(r)
    pieces = (
        RowRange(p.request, max(p.start, r.start), min(p.end, r.end))
        for p in parts
        for r in by_request.get(p.request, ())
    )
    return tuple(r for r in pieces if r.start < r.end)


def subtract(
    ranges: Iterable[RowRange], dropped: Iterable[Segment | RowRange]
) -> tuple[RowRange, ...]:
    """The rows of ``ranges`` that lie in none of ``dropped``."""
    by_request: dict[int, list[RowRange]] = {}
    for d in merge(dropped):
        by_request.setdefault(d.request, []).append(d)
    out: list[RowRange] = []
    for r in ranges:
        start = r.start
        for d in by_request.get(r.request, ()):
            if d.start > start:
                out.append(RowRange(r.request, start, min(d.start, r.end)))
            start = max(start, d.end)
            if start >= r.end:
                break
        out.append(RowRange(r.request, start, r.end))
    return tuple(r for r in out if r.start < r.end)


def expand(spans: Iterable[tuple[int, int, int]]) -> tuple[Indices, Indices]:
    """(request, position) of every row of ``(request, start, end)`` spans, int64, in order."""
    listed = np.array(list(spans), dtype=np.int64).reshape(-1, 3)
    lengths = listed[:, 2] - listed[:, 1]
    first = np.cumsum(lengths) - lengths
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(first, lengths)
    return np.repeat(listed[:, 0], lengths), np.repeat(listed[:, 1], lengths) + within


def offsets(ranges: Iterable[Segment | RowRange]) -> Table:
    """Where each range starts when they are laid one after the other."""
    table: dict[int, list[tuple[int, int, int]]] = {}
    offset = 0
    for r in ranges:
        table.setdefault(r.request, []).append((r.start, r.end, offset))
        offset += r.end - r.start
    return table


def lookup(tables: Sequence[Table], rows: RowRange, bases: Sequence[int]) -> Indices:
    """Offsets of ``rows``; a later table wins. ValueError for a row in none of them."""
    out = np.full(max(0, rows.end - rows.start), -1, dtype=np.int64)
    for table, base in zip(tables, bases, strict=True):
        for start, end, offset in table.get(rows.request, ()):
            low, high = max(start, rows.start), min(end, rows.end)
            if low < high:
                first = base + offset + low - start
                out[low - rows.start : high - rows.start] = np.arange(first, first + high - low)
    missing = np.flatnonzero(out < 0)
    if missing.size:
        raise ValueError(
            f"row {rows.start + int(missing[0])} of {rows} is provided by no one"
            f" ({missing.size} such rows)"
        )
    return out


def lookup_all(tables: Sequence[Table], ranges: Iterable[RowRange]) -> Indices:
    """Offsets of all rows of ``ranges``, one range after the other; see ``lookup``."""
    found = [lookup(tables, r, (0,) * len(tables)) for r in ranges]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
