"""The cut, the rows that travel and the entries: every wanted row is found, nothing twice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.parallel.partition import (
    Chunk,
    EntryPlan,
    RowPlan,
    RowRange,
    Segment,
    Segments,
    Wants,
    cut,
    entries_of,
    entry_plan,
    find_token,
    group_wants,
    local_index,
    local_tokens,
    mtp_rows,
    mtp_segments,
    num_tokens,
    plan_rows,
    window_wants,
)

WINDOW = 128
EDGES = [0, 1, 2, 3, 4, 63, 124, 125, 126, 127]


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[Chunk]:
    """One to four chunks that start and end anywhere, often around multiples of 128."""
    out = []
    for _ in range(draw(st.integers(1, 4))):
        residue = draw(st.one_of(st.sampled_from(EDGES), st.integers(0, 127)))
        start = 128 * draw(st.integers(0, 5)) + residue
        around = st.builds(lambda k, d: max(1, 128 * k + d), st.integers(0, 5), st.integers(-3, 3))
        out.append(Chunk(start, start + draw(st.one_of(st.integers(1, 600), around))))
    return out


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Chunk], Segments, list[list[int]]]:
    """Chunks, their cut over 1, 2 or 4 ranks, and tails at some multiples of 128 in each chunk."""
    chunks = draw(chunk_lists())
    minimum = draw(st.sampled_from([0, 0, 200, 10_000]))
    tails = []
    for c in chunks:
        inside = range((c.start // 128 + 1) * 128, c.end + 1, 128)
        tails.append(sorted(draw(st.sets(st.sampled_from(inside)))) if inside else [])
    return chunks, cut(chunks, draw(st.sampled_from([1, 2, 4])), minimum), tails


# --- the cut -----------------------------------------------------------------------------------


@given(chunk_lists(), st.sampled_from([1, 2, 4]), st.sampled_from([0, 100, 1024]))
def test_segments_partition_every_chunk(chunks: list[Chunk], cp: int, minimum: int) -> None:
    parts = cut(chunks, cp, minimum)
    assert len(parts) == cp
    assert all(list(p) == sorted(p, key=lambda s: (s.request, s.start)) for p in parts)
    for request, chunk in enumerate(chunks):
        own = sorted((s.start, s.end) for part in parts for s in part if s.request == request)
        assert all(a < b for a, b in own)
        assert own[0][0] == chunk.start
        assert own[-1][1] == chunk.end
        assert all(left[1] == right[0] for left, right in pairwise(own))
        assert all(edge % 128 == 0 for _, edge in own[:-1])
        if chunk.end - chunk.start < minimum or cp == 1:
            assert len(own) == 1


@given(st.integers(0, 5000), st.integers(1, 60_000), st.sampled_from([2, 4, 8]))
def test_zigzag_is_as_even_as_multiples_of_128_allow(start: int, length: int, cp: int) -> None:
    parts = cut([Chunk(start, start + length)], cp, 0)
    for rank, part in enumerate(parts):
        # Each of the two segments is off by at most half a unit at both edges.
        assert abs(num_tokens(part) - length / cp) <= 2 * 128
        for s in part:
            middle = ((s.start + s.end) / 2 - start) / length * 2 * cp
            nearest = min((rank + 0.5, 2 * cp - rank - 0.5), key=lambda m: abs(m - middle))
            assert abs(nearest - middle) <= 128 * 2 * cp / length


def test_zigzag_pairs_early_and_late_segments() -> None:
    parts = cut([Chunk(0, 1024)], 4, 1024)
    assert parts[0] == (Segment(0, 0, 128), Segment(0, 896, 1024))
    assert parts[3] == (Segment(0, 384, 512), Segment(0, 512, 640))
    # Work that grows with the position is balanced; a contiguous cut would give 1.75 x.
    work = [sum(s.end**2 - s.start**2 for s in p) for p in cut([Chunk(0, 1 << 16)], 4, 0)]
    assert max(work) == min(work)


def test_short_chunks_go_whole_to_the_least_loaded_rank() -> None:
    chunks = [Chunk(0, 100), Chunk(0, 900), Chunk(500, 1000), Chunk(0, 450)]
    parts = cut(chunks, 2, 1024)
    assert parts[0] == (Segment(0, 0, 100), Segment(1, 0, 900))
    assert parts[1] == (Segment(2, 500, 1000), Segment(3, 0, 450))
    # A long chunk's load counts: both ranks have half of it, the short one goes to rank 0.
    assert cut([Chunk(0, 2048), Chunk(7, 8)], 2, 1024)[0][-1] == Segment(1, 7, 8)


def test_fewer_tokens_than_ranks_leaves_ranks_empty() -> None:
    parts = cut([Chunk(130, 132)], 4, 0)
    assert sorted(map(len, parts)) == [0, 0, 0, 1]
    chunks = [Chunk(130, 132)]
    own, shared = window_wants(chunks, parts, WINDOW, [[]])
    plan = plan_rows(chunks, parts, rank_wants=own, shared_wants=shared, publish_all=False)
    for rank in range(4):
        assert plan.index(rank, RowRange(0, 130, 132)).size == 2


def test_one_rank_has_one_segment_per_chunk_and_sends_nothing() -> None:
    chunks = [Chunk(5, 700), Chunk(0, 1)]
    parts = cut(chunks, 1, 0)
    assert parts == ((Segment(0, 5, 700), Segment(1, 0, 1)),)
    own, shared = window_wants(chunks, parts, WINDOW, [[128], []])
    plan = plan_rows(chunks, parts, rank_wants=own, shared_wants=shared, publish_all=True)
    assert plan.counts == (0,)
    assert plan.sent_rows(0) == plan.received_rows(0) == 0


@pytest.mark.parametrize("chunk", [Chunk(3, 3), Chunk(-1, 4), Chunk(9, 2)])
def test_impossible_chunks_are_refused(chunk: Chunk) -> None:
    with pytest.raises(ValueError, match="chunk 1 is"):
        cut([Chunk(0, 4), chunk], 2, 0)
    with pytest.raises(ValueError, match="cp_size = 0"):
        cut([Chunk(0, 4)], 0, 0)


# --- row streams: build the buffers with unique row ids, as the ranks would ----------------------


def row_id(request: int, position: int) -> int:
    return request * 1_000_000 + position


def buffers(plan: RowPlan, segments: Segments) -> list[np.ndarray]:
    """Per rank ``[local | gathered | carried]`` of row ids."""
    local = [row_id(*local_tokens(own)) for own in segments]  # type: ignore[arg-type]
    sent = [local[rank][plan.local_rows(rank)] for rank in range(len(segments))]
    assert [len(s) for s in sent] == list(plan.counts)
    carried = row_id(*plan.carried_rows())  # type: ignore[arg-type]
    return [np.concatenate([own, *sent, carried]) for own in local]


def check_stream(
    chunks: list[Chunk], segments: Segments, wants: Wants, publish_all: bool
) -> RowPlan:
    own, shared = wants
    plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=publish_all)
    for rank, buffer in enumerate(buffers(plan, segments)):
        assert len(buffer) == plan.buffer_rows(rank)
        for wanted in (*own[rank], *shared):
            index = plan.index(rank, wanted)
            expected = row_id(wanted.request, np.arange(wanted.start, wanted.end))
            assert (buffer[index] == expected).all()
            mine = np.isin(expected, buffer[: plan.num_local[rank]])
            assert (index[mine] < plan.num_local[rank]).all()  # a local copy is preferred
    return plan


def row_set(ranges: tuple[RowRange, ...]) -> set[tuple[int, int]]:
    return {(r.request, p) for r in ranges for p in range(r.start, r.end)}


def check_minimal(chunks: list[Chunk], segments: Segments, wants: Wants, plan: RowPlan) -> None:
    """Exactly the rows that another rank wants travel; carried is exactly what lies before."""
    asked = [row_set((*own, *wants[1])) for own in wants[0]]
    before = {(i, p) for part in asked for i, p in part if p < chunks[i].start}
    assert row_set(plan.carried) == before
    for rank, own in enumerate(segments):
        others = set().union(*(a for q, a in enumerate(asked) if q != rank))
        assert row_set(plan.send[rank]) == row_set(own) & others  # type: ignore[arg-type]
        assert num_tokens(plan.send[rank]) == plan.counts[rank]  # disjoint


@settings(max_examples=60)
@given(steps(), st.sampled_from([1, 7, 128]), st.booleans())
def test_window_rows_are_found(
    step: tuple[list[Chunk], Segments, list[list[int]]], window: int, publish_all: bool
) -> None:
    chunks, segments, tails = step
    wants = window_wants(chunks, segments, window, tails)
    plan = check_stream(chunks, segments, wants, publish_all)
    if not publish_all:
        check_minimal(chunks, segments, wants, plan)
    for rank, own in enumerate(segments):
        request, position = local_tokens(own)
        for i, p in zip(request.tolist()[::37], position.tolist()[::37], strict=True):
            assert plan.index(rank, RowRange(i, max(0, p - window + 1), p + 1)).size
            assert find_token(segments, i, p)[0] == rank
    for i, c in enumerate(chunks):
        for end in (c.end, *tails[i]):  # the ring write and the tails, on every rank
            for rank in range(len(segments)):
                plan.index(rank, RowRange(i, max(0, end - window + 1), end))


@settings(max_examples=60)
@given(steps(), st.sampled_from([(4, True), (128, False)]), st.booleans())
def test_group_rows_are_found_and_groups_pooled_once(
    step: tuple[list[Chunk], Segments, list[list[int]]], kind: tuple[int, bool], everyone: bool
) -> None:
    chunks, segments, tails = step
    ratio, overlap = kind
    wants = group_wants(chunks, segments, ratio, overlap, tails, everyone=everyone)
    plan = check_stream(chunks, segments, wants, publish_all=everyone)
    if not everyone:
        check_minimal(chunks, segments, wants, plan)
    entries = entry_plan(chunks, segments, ratio, everyone=everyone)
    expected = [
        (i, w)
        for i, c in enumerate(chunks)
        for w in range(c.end // ratio)
        if c.start <= (w + 1) * ratio - 1 < c.end
    ]
    gathered = pairs(*entries.gathered())
    assert sorted(gathered) == expected  # all complete groups, exactly once
    for rank in range(len(segments)):
        pooled = pairs(*entries.pooled(rank))
        assert len(pooled) == entries.counts[rank]
        if everyone:
            assert pooled == expected
        for i, w in pooled:  # what pooling this entry reads is there
            rows = RowRange(i, max(0, (w - overlap) * ratio), (w + 1) * ratio)
            plan.index(rank, rows)
            if not everyone:
                assert find_token(segments, i, rows.end - 1)[0] == rank
    if not everyone:
        assert gathered == [e for r in range(len(segments)) for e in pairs(*entries.pooled(r))]
    for i, c in enumerate(chunks):  # every rank can write the open group and the look-back rows
        for end in (c.end, *tails[i]):
            state = RowRange(i, max(0, (end // ratio - overlap) * ratio), end)
            for rank in range(len(segments)):
                plan.index(rank, state)


def pairs(request: np.ndarray, entry: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(request.tolist(), entry.tolist(), strict=True))


@given(chunk_lists(), st.sampled_from([2, 4]), st.sampled_from([0, 200]))
def test_a_128_cut_leaves_no_group_between_two_segments(
    chunks: list[Chunk], cp: int, minimum: int
) -> None:
    """Only a group that the chunk's start cuts may have rows outside its pooling segment."""
    for part in cut(chunks, cp, minimum):
        for s in part:
            for ratio in (4, 128):
                w0, w1 = entries_of(s, ratio)
                if w0 < w1 and s.start != chunks[s.request].start:
                    assert w0 * ratio == s.start


def test_halo_spans_carried_rows_and_several_ranks() -> None:
    chunks = [Chunk(126, 400)]
    segments = ((Segment(0, 126, 128), Segment(0, 384, 400)), (Segment(0, 128, 384),))
    own, shared = window_wants(chunks, segments, WINDOW, [[256]])
    plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=False)
    # Rank 1's first row sees 1 .. 128: 125 carried, two of rank 0, one of its own.
    index = plan.index(1, RowRange(0, 1, 129))
    carried = plan.num_local[1] + sum(plan.counts)
    assert plan.carried == (RowRange(0, 0, 126),)
    assert index.tolist() == [*range(carried + 1, carried + 126), 256, 257, 0]
    assert plan.send[0] == (RowRange(0, 126, 128), RowRange(0, 384, 400))
    # Rank 0's last segment sees from 257 on, the tail at 256 keeps 129 .. 255: nobody else wants 256.
    assert plan.send[1] == (RowRange(0, 129, 256), RowRange(0, 257, 384))


def test_unprovided_and_impossible_rows_are_errors() -> None:
    chunks = [Chunk(10, 300)]
    segments = cut(chunks, 2, 0)
    nothing = [(), ()]
    plan = plan_rows(chunks, segments, rank_wants=nothing, shared_wants=(), publish_all=False)
    other = segments[1][0].start
    with pytest.raises(ValueError, match=f"row {other} of .* provided by no one"):
        plan.index(0, RowRange(0, other - 1, other + 1))
    with pytest.raises(ValueError, match="row 9 "):
        plan.index(0, RowRange(0, 9, 11))
    for wrong in (RowRange(0, -1, 5), RowRange(0, 5, 301)):
        with pytest.raises(ValueError, match=r"allowed: 0 \.\. 300"):
            plan_rows(chunks, segments, rank_wants=nothing, shared_wants=[wrong], publish_all=False)
    with pytest.raises(ValueError, match="1 ranks, segments 2"):
        plan_rows(chunks, segments, rank_wants=[()], shared_wants=(), publish_all=False)
    with pytest.raises(ValueError, match="no rank computes position 300"):
        find_token(segments, 0, 300)


@settings(max_examples=40)
@given(steps(), st.sampled_from([0, 1]))
def test_mtp_rows_cover_rings_and_tails_and_nothing_else(
    step: tuple[list[Chunk], Segments, list[list[int]]], shift: int
) -> None:
    chunks, segments, tails = step
    tails = [[b - shift for b in part] for part in tails]  # an MTP tail ends one row earlier
    parts = mtp_segments(chunks, segments, WINDOW, tails)
    shared = window_wants(chunks, segments, WINDOW, tails)[1]
    kept = {(i, p) for i, p in row_set(shared) if p >= chunks[i].start}
    assert row_set(tuple(s for part in parts for s in part)) == kept  # type: ignore[arg-type]
    rows = mtp_rows(chunks, segments, WINDOW, tails)
    for rank, own in enumerate(segments):
        request, position = local_tokens(own)
        chosen = pairs(request[rows[rank]], position[rows[rank]])
        assert chosen == pairs(*local_tokens(parts[rank]))
        as_ranges = [RowRange(s.request, s.start, s.end) for s in parts[rank]]
        assert (local_index(own, as_ranges) == rows[rank]).all()
    # The MTP stream is planned over those rows alone.
    nothing: tuple[tuple[RowRange, ...], ...] = ((),) * len(segments)
    plan = check_stream(chunks, parts, (nothing, shared), publish_all=False)
    if len(segments) > 1:
        assert sum(plan.counts) == len(kept)


# --- sizes -------------------------------------------------------------------------------------


def test_predicted_rows_count_padding_and_receivers() -> None:
    chunks = [Chunk(0, 1000)]
    segments = cut(chunks, 4, 0)
    own, shared = group_wants(chunks, segments, 4, True, [[]])
    plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=False)
    # Of 8 segments the last group travels to the next one, or to all as the state; the one between
    # rank 3's two segments stays at home.
    assert plan.counts == (8, 8, 8, 4)
    assert plan.sent_rows(0) == 3 * max(plan.counts)
    entries = entry_plan(chunks, segments, 4)
    assert sum(entries.counts) == 250
    assert entries.sent_rows(1) == entries.received_rows(2) == 3 * max(entries.counts)
    assert entry_plan(chunks, segments, 4, everyone=True).sent_rows(0) == 0
    both = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=True)
    assert both.counts == tuple(num_tokens(part) for part in segments)


def test_compressed_gather_moves_far_less_than_publishing_all() -> None:
    chunks = [Chunk(0, 16_384)]
    segments = cut(chunks, 4, 1024)
    rows = [
        plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=False)
        for own, shared in (
            window_wants(chunks, segments, WINDOW, [[]]),
            group_wants(chunks, segments, 4, True, [[]]),
            group_wants(chunks, segments, 128, False, [[]]),
        )
    ]
    # Of 8 segments 7 send their window tail and last group (between rank 3's two it stays at home);
    # whole HCA groups need nothing.
    assert [sum(plan.counts) for plan in rows] == [7 * 127, 7 * 4, 0]


def test_a_64k_chunk_is_planned_quickly() -> None:
    chunks = [Chunk(3, 3 + 65_536), *(Chunk(k, k + 300) for k in range(40))]
    segments = cut(chunks, 8, 1024)
    tails: list[list[int]] = [list(range(8192, 65_537, 8192)), *([] for _ in range(40))]
    plans: list[tuple[RowPlan, EntryPlan]] = []
    for ratio, overlap in ((4, True), (128, False)):
        own, shared = group_wants(chunks, segments, ratio, overlap, tails)
        plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=False)
        entries = entry_plan(chunks, segments, ratio)
        for rank in range(8):
            for wanted in own[rank]:
                plan.index(rank, wanted)
        plans.append((plan, entries))
    assert sum(plans[0][1].counts) == sum(c.end // 4 - c.start // 4 for c in chunks)
