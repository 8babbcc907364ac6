"""The cut of a prefill step over the cp ranks, as pure arithmetic on token ranges.

Three questions are answered here and nowhere else: which rank computes which tokens (``cut``),
which rows of a *row stream* (one row per token: window KV, compressor ``u, g``) travel and where
each wanted row lies afterwards (``plan_rows``), and which rank pools which compressed entry
(``entry_plan``).

Positions are absolute, ``end`` is exclusive, ``request`` is the index of the chunk in the step.
A rank's *local tokens* are its segments, concatenated in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from model.parallel.ranges import (
    Chunk,
    Indices,
    RowRange,
    Segment,
    Table,
    expand,
    intersect,
    lookup,
    lookup_all,
    merge,
    offsets,
    subtract,
)

__all__ = [
    "CUT_ALIGN",
    "Chunk",
    "EntryPlan",
    "Indices",
    "RowPlan",
    "RowRange",
    "Segment",
    "Segments",
    "Wants",
    "cut",
    "entries_of",
    "entry_plan",
    "find_token",
    "group_wants",
    "local_index",
    "local_tokens",
    "mtp_rows",
    "mtp_segments",
    "num_tokens",
    "plan_rows",
    "window_wants",
]

CUT_ALIGN = 128  # interior cuts split no ratio-4 and no ratio-128 group
_COST_SPAN = 65536  # a row at this position costs twice a row at 0 (index scoring, HCA)

Segments = Sequence[Sequence[Segment]]  # [cp rank][...]
Wants = tuple[tuple[tuple[RowRange, ...], ...], tuple[RowRange, ...]]  # per rank, of every rank


def cut(chunks: Sequence[Chunk], cp_size: int, min_tokens: int) -> tuple[tuple[Segment, ...], ...]:
    """Spread the chunks of a step over ``cp_size`` ranks.

    A chunk of at least ``min_tokens`` tokens is cut into ``2 * cp_size`` segments at absolute
    multiples of 128, as even as that allows; rank r takes segments r and ``2 * cp_size - 1 - r``,
    empty ones are dropped. Shorter chunks go whole to the least loaded rank, the dearest first.

    Returns:
        Per rank its segments, ordered by (request, start). A rank may have none.

    Raises:
        ValueError: a chunk without tokens or before position 0, or cp_size < 1.
    """
    if cp_size < 1:
        raise ValueError(f"cp_size = {cp_size}, allowed: at least 1")
    for request, chunk in enumerate(chunks):
        if not 0 <= chunk.start < chunk.end:
            raise ValueError(f"chunk {request} is {chunk}, allowed: 0 <= start < end")
    if cp_size == 1:
        return (tuple(Segment(i, c.start, c.end) for i, c in enumerate(chunks)),)
    parts: list[list[Segment]] = [[] for _ in range(cp_size)]
    load = [0] * cp_size
    whole: list[Segment] = []
    for request, chunk in enumerate(chunks):
        if chunk.end - chunk.start < min_tokens:
            whole.append(Segment(request, chunk.start, chunk.end))
            continue
        edges = _edges(chunk, 2 * cp_size)
        for index, (start, end) in enumerate(pairwise(edges)):
            if start < end:
                rank = min(index, 2 * cp_size - 1 - index)
                parts[rank].append(Segment(request, start, end))
                load[rank] += _cost(start, end)
    for segment in sorted(whole, key=lambda s: (-_cost(s.start, s.end), s.request)):
        rank = min(range(cp_size), key=lambda r: (load[r], r))
        parts[rank].append(segment)
        load[rank] += _cost(segment.start, segment.end)
    return tuple(tuple(sorted(part, key=lambda s: (s.request, s.start))) for part in parts)


def _edges(chunk: Chunk, pieces: int) -> list[int]:
    """``pieces + 1`` ascending edges; interior ones: the multiples of 128 nearest to even."""
    length, unit = chunk.end - chunk.start, CUT_ALIGN * pieces
    inner = (
        (chunk.start * pieces + j * length + unit // 2) // unit * CUT_ALIGN
        for j in range(1, pieces)
    )
    return [chunk.start, *(min(max(edge, chunk.start), chunk.end) for edge in inner), chunk.end]


def _cost(start: int, end: int) -> int:
    """Relative work of rows ``start .. end - 1``: later rows see more entries."""
    return (end - start) * (2 * _COST_SPAN + start + end)


def num_tokens(segments: Iterable[Segment | RowRange]) -> int:
    """Tokens in one rank's segments."""
    return sum(s.end - s.start for s in segments)


def local_tokens(segments: Iterable[Segment]) -> tuple[Indices, Indices]:
    """(request, position) of one rank's local tokens, int64 ``[num_local]`` each."""
    return expand((s.request, s.start, s.end) for s in segments)


def find_token(segments: Segments, request: int, position: int) -> tuple[int, int]:
    """(cp rank, index among its local tokens) of one token; ValueError when nobody computes it."""
    for rank, own in enumerate(segments):
        offset = 0
        for s in own:
            if s.request == request and s.start <= position < s.end:
                return rank, offset + position - s.start
            offset += s.end - s.start
    raise ValueError(f"no rank computes position {position} of request {request}")


def local_index(segments: Sequence[Segment], ranges: Iterable[RowRange]) -> Indices:
    """Indices into one rank's local tokens of those of its own rows that lie in ``ranges``."""
    own = intersect(segments, merge(ranges))
    return lookup_all((offsets(segments),), own)


def mtp_segments(
    chunks: Sequence[Chunk], segments: Segments, window: int, tails: Sequence[Sequence[int]]
) -> tuple[tuple[Segment, ...], ...]:
    """Per rank those parts of its segments whose MTP window row anyone keeps (rings and tails).

    They are a valid ``segments`` argument of ``plan_rows``: the MTP stream has rows nowhere else.
    ``local_index(segments[rank], mtp_segments(...)[rank])`` are the local tokens to compute.
    """
    kept = merge(window_wants(chunks, segments, window, tails)[1])
    return tuple(
        tuple(Segment(r.request, r.start, r.end) for r in intersect(own, kept)) for own in segments
    )


def mtp_rows(
    chunks: Sequence[Chunk], segments: Segments, window: int, tails: Sequence[Sequence[int]]
) -> tuple[Indices, ...]:
    """Per rank the local token indices whose MTP window row must be computed; see mtp_segments."""
    kept = window_wants(chunks, segments, window, tails)[1]
    return tuple(local_index(own, kept) for own in segments)


# --- what each row stream wants ----------------------------------------------------------------


def window_wants(
    chunks: Sequence[Chunk], segments: Segments, window: int, tails: Sequence[Sequence[int]]
) -> Wants:
    """Window KV rows: each rank those its queries see; all ranks those rings and tails keep.

    Args:
        window: sliding window in tokens, the query's own row included.
        tails: per chunk the positions at which the state is saved.
    """
    own = tuple(
        tuple(RowRange(s.request, max(0, s.start - window + 1), s.end) for s in part)
        for part in segments
    )
    ends = ((i, b) for i, c in enumerate(chunks) for b in (c.end, *tails[i]))
    shared = (RowRange(i, max(0, b - window + 1), b) for i, b in ends)
    return own, tuple(r for r in shared if r.start < r.end)


def group_wants(
    chunks: Sequence[Chunk],
    segments: Segments,
    ratio: int,
    overlap: bool,
    tails: Sequence[Sequence[int]],
    everyone: bool = False,
) -> Wants:
    """Compressor rows: the rank that owns a group's last token pools it and wants the group's rows.

    Args:
        ratio: tokens of one group.
        overlap: an entry also pools the group before its own (CSA).
        tails: per chunk the positions at which the state is saved.
        everyone: every rank pools all entries (gather ``kv_bf16``).
    """
    back = int(overlap)
    own = tuple(
        tuple(RowRange(i, max(0, (w0 - back) * ratio), w1 * ratio) for i, w0, w1 in part)
        for part in entry_plan(chunks, segments, ratio, everyone=everyone).ranges
    )
    ends = ((i, b) for i, c in enumerate(chunks) for b in (c.end, *tails[i]))
    shared = (RowRange(i, max(0, (b // ratio - back) * ratio), b) for i, b in ends)
    return own, tuple(r for r in shared if r.start < r.end)


# --- compressed entries ------------------------------------------------------------------------


def entries_of(segment: Segment | Chunk, ratio: int) -> tuple[int, int]:
    """Entries ``w0 .. w1 - 1`` whose last token lies in the segment."""
    return segment.start // ratio, segment.end // ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPlan:
    """Which rank pools which entries of one ratio; ``ranges[rank]`` holds (request, w0, w1).

    With ``everyone`` all ranks pool the same, all of them, and nothing is gathered.
    """

    ranges: tuple[tuple[tuple[int, int, int], ...], ...]
    everyone: bool

    @property
    def counts(self) -> tuple[int, ...]:
        """Entries each rank pools."""
        return tuple(sum(w1 - w0 for _, w0, w1 in part) for part in self.ranges)

    def pooled(self, rank: int) -> tuple[Indices, Indices]:
        """(request, entry) of what a rank pools, in its order; int64 ``[counts[rank]]`` each."""
        return expand(self.ranges[rank])

    def gathered(self) -> tuple[Indices, Indices]:
        """(request, entry) of all entries after the gather: rank-major, unpadded."""
        parts = self.ranges[:1] if self.everyone else self.ranges
        return expand(r for part in parts for r in part)

    def sent_rows(self, rank: int) -> int:
        """Rows the gather moves out of a rank, padding and every receiver counted."""
        return 0 if self.everyone else max(self.counts) * (len(self.ranges) - 1)

    def received_rows(self, rank: int) -> int:
        """Rows the gather moves into a rank, padding counted."""
        return self.sent_rows(rank)


def entry_plan(
    chunks: Sequence[Chunk], segments: Segments, ratio: int, everyone: bool = False
) -> EntryPlan:
    """Share the entries that this step completes: each belongs to the owner of its last token."""
    if everyone:
        spans = [(i, *entries_of(c, ratio)) for i, c in enumerate(chunks)]
        ranges = (tuple(r for r in spans if r[1] < r[2]),) * len(segments)
    else:
        owned = [[(s.request, *entries_of(s, ratio)) for s in part] for part in segments]
        ranges = tuple(tuple(r for r in part if r[1] < r[2]) for part in owned)
    return EntryPlan(ranges=ranges, everyone=everyone)


# --- rows that travel --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """How one row stream reaches those who want it.

    A rank's row buffer is ``[local rows | gathered rows of all ranks, rank-major, unpadded |
    carried rows]``; ``index`` says where wanted rows lie in it.

    Attributes:
        num_local: rows each rank computes.
        send: per rank its own rows that others want: merged, ordered, disjoint.
        counts: rows in ``send``, per rank.
        carried: rows before the chunks that any rank wants, the same on every rank; they are read
            from the sequences' carried state in this order.
    """

    num_local: tuple[int, ...]
    send: tuple[tuple[RowRange, ...], ...]
    counts: tuple[int, ...]
    carried: tuple[RowRange, ...]
    _local: tuple[Table, ...] = field(repr=False)
    _gathered: Table = field(repr=False)
    _carried: Table = field(repr=False)

    def local_rows(self, rank: int) -> Indices:
        """Indices into the rank's local tokens of the rows it sends, in sending order."""
        return lookup_all((self._local[rank],), self.send[rank])

    def carried_rows(self) -> tuple[Indices, Indices]:
        """(request, position) of the carried rows, in buffer order."""
        return expand((r.request, r.start, r.end) for r in self.carried)

    def buffer_rows(self, rank: int) -> int:
        """Rows of the rank's whole row buffer."""
        return self.num_local[rank] + sum(self.counts) + num_tokens(self.carried)

    def index(self, rank: int, rows: RowRange) -> Indices:
        """Buffer positions of ``rows``, int64 ``[end - start]``; a local copy is preferred.

        Raises:
            ValueError: a row that no one provides to this rank.
        """
        gathered = self.num_local[rank]
        carried = gathered + sum(self.counts)
        tables = (self._carried, self._gathered, self._local[rank])
        return lookup(tables, rows, (carried, gathered, 0))

    def sent_rows(self, rank: int) -> int:
        """Rows the gather moves out of a rank: padded to the longest, once per receiver."""
        return max(self.counts) * (len(self.counts) - 1)

    def received_rows(self, rank: int) -> int:
        """Rows the gather moves into a rank, padding counted."""
        return self.sent_rows(rank)


def plan_rows(
    chunks: Sequence[Chunk],
    segments: Segments,
    *,
    rank_wants: Sequence[Iterable[RowRange]],
    shared_wants: Iterable[RowRange],
    publish_all: bool,
) -> RowPlan:
    """Plan one row stream.

    Args:
        segments: per rank the rows it computes.
        rank_wants: per rank the rows it needs.
        shared_wants: rows that every rank needs.
        publish_all: every rank sends all its rows (gather ``kv_bf16``), wanted or not. One rank
            alone never sends.

    Raises:
        ValueError: a wanted row lies before position 0 or after its chunk.
    """
    shared = merge(shared_wants)
    wants = [merge(part) for part in rank_wants]
    if len(wants) != len(segments):
        raise ValueError(f"rank_wants lists {len(wants)} ranks, segments {len(segments)}")
    everything = merge([*shared, *(r for part in wants for r in part)])
    for r in everything:
        if r.start < 0 or r.end > chunks[r.request].end:
            raise ValueError(f"wanted {r}, allowed: 0 .. {chunks[r.request].end} of that request")
    if len(segments) == 1:
        send: tuple[tuple[RowRange, ...], ...] = ((),)
    elif publish_all:
        send = tuple(merge(own) for own in segments)
    else:
        # A rank's wants less its own rows hit only other ranks' rows, so one union serves all.
        foreign = (
            r for own, part in zip(segments, wants, strict=True) for r in subtract(part, own)
        )
        travelling = merge([*shared, *foreign])
        send = tuple(merge(intersect(own, travelling)) for own in segments)
    before = (RowRange(r.request, r.start, min(r.end, chunks[r.request].start)) for r in everything)
    carried = tuple(r for r in before if r.start < r.end)
    return RowPlan(
        num_local=tuple(num_tokens(own) for own in segments),
        send=send,
        counts=tuple(num_tokens(part) for part in send),
        carried=carried,
        _local=tuple(offsets(own) for own in segments),
        _gathered=offsets(r for part in send for r in part),
        _carried=offsets(carried),
    )
