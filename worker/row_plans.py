"""Which rows of a prefill step travel, kept for the last steps: a long prompt's first chunks come back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from model.deepseek_v4.config import CSA_RATIO
from model.parallel.partition import RowPlan, cut, group_wants, plan_rows, window_wants
from model.parallel.ranges import Chunk, Indices, Segment
from worker.protocol import PrefillSlice

Chunks = tuple[Chunk, ...]
Parts = tuple[tuple[Segment, ...], ...]  # segments by cp rank
Tails = tuple[tuple[int, ...], ...]  # positions by request

_KEPT = 16  # plans of each kind

cut_chunks = functools.lru_cache(maxsize=_KEPT)(cut)


def tails_of(slices: Sequence[PrefillSlice]) -> Tails:
    """Positions whose tails each request saves in this step."""
    return tuple(tuple(save.position for save in s.save_tails) for s in slices)


def rank_major(items: Sequence[tuple[int, int]], ranks: int) -> tuple[list[Indices], Indices]:
    """Items (rank, number) as they are gathered: every rank's numbers, and where each item then lies."""
    numbers: list[list[int]] = [[] for _ in range(ranks)]
    places = []
    for rank, number in items:
        places.append((rank, len(numbers[rank])))
        numbers[rank].append(number)
    starts = np.cumsum([0, *map(len, numbers)])
    order = np.array([starts[rank] + i for rank, i in places], dtype=np.int64)
    return [np.array(own, dtype=np.int64) for own in numbers], order


@functools.lru_cache(maxsize=_KEPT)
def window_rows(
    chunks: Chunks, segments: Parts, tails: Tails, window: int, publish_all: bool
) -> RowPlan:
    """Window latents that travel, so that every rank has the ``window`` before its queries."""
    own, shared = window_wants(chunks, segments, window, tails)
    return plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=publish_all)


@functools.lru_cache(maxsize=_KEPT)
def group_rows(
    chunks: Chunks, segments: Parts, tails: Tails, ratio: int, everyone: bool, publish_all: bool
) -> RowPlan:
    """Compressor rows of one ratio that travel to whoever pools their groups (``everyone``: all ranks)."""
    overlap = ratio == CSA_RATIO
    own, shared = group_wants(chunks, segments, ratio, overlap, tails, everyone=everyone)
    return plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=publish_all)
