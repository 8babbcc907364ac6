"""Sizes that decode steps are padded to."""

from __future__ import annotations

from worker.cuda_graph import DecodeGraphs


def test_padded_sizes() -> None:
    assert DecodeGraphs.batches(5) == [1, 2, 4, 5]
    assert DecodeGraphs.batches(20) == [1, 2, 4, 8, 16, 20]
    assert [DecodeGraphs.shape(n, 1).requests for n in (1, 3, 9, 64)] == [1, 4, 16, 64]
    assert DecodeGraphs.shape(1, 17).blocks == 32
