"""Rows of a prefill step that outlive it: in their slots' rings, and in tails for later requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.forward_batch import RowExchange
from model.parallel.partition import RowPlan
from model.parallel.ranges import Indices, RowRange
from worker.batch_layout import joined, on_host
from worker.protocol import PrefillSlice


class KeptRows:
    """What one rank stores of a row stream, collected range by range.

    Args:
        plan: where the stream's rows lie in the rank's buffer.
        rank: the cp rank.
    """

    def __init__(self, plan: RowPlan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._ring: list[tuple[Indices, Indices]] = []
        self._tails: list[tuple[Indices, Indices]] = []

    def keep(self, rows: RowRange, dest: Indices) -> None:
        """Store rows in the ring rows ``dest``."""
        self._ring.append((self._plan.index(self._rank, rows), dest))

    def save(self, rows: RowRange, dest: Indices) -> None:
        """Store rows in the tail rows ``dest``."""
        self._tails.append((self._plan.index(self._rank, rows), dest))

    def exchange(self, slices: Sequence[PrefillSlice], ring_rows: int) -> RowExchange:
        """How the stream travels, and what is stored of it; rings have ``ring_rows`` rows."""
        request, position = self._plan.carried_rows()
        slot = np.array([s.slot for s in slices], dtype=np.int64)
        return RowExchange(
            send=on_host(self._plan.local_rows(self._rank)),
            counts=self._plan.counts,
            carried=on_host(slot[request] * ring_rows + position % ring_rows),
            state_source=joined(source for source, _ in self._ring),
            state_dest=joined(dest for _, dest in self._ring),
            tail_source=joined(source for source, _ in self._tails),
            tail_dest=joined(dest for _, dest in self._tails),
        )
