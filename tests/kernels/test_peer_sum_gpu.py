"""``peer_sum`` on one GPU: ranks are streams, so their kernels run side by side."""

from __future__ import annotations

import pytest
import torch

from kernels import peer_sum
from kernels.peer_sum.api import CAPACITY, MOST_RANKS
from tests.kernels.test_peer_sum import SIZES, ascending, ranks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("size", [2, 3, 4, MOST_RANKS])
def test_ranks_get_the_bits_of_an_ascending_sum(size: int) -> None:
    torch.manual_seed(size)
    ranks = ranks_of(size, "cuda")
    streams = [torch.cuda.Stream() for _ in range(size)]  # type: ignore[no-untyped-call]
    rounds = [[torch.randn(n, device="cuda") * 10.0**r for r in range(size)] for n in SIZES * 20]
    sums = [[part.clone() for part in parts] for parts in rounds]
    torch.cuda.synchronize()
    for parts in sums:
        for peers, stream, x in zip(ranks, streams, parts, strict=True):
            with torch.cuda.stream(stream):
                peer_sum(x, peers)
    torch.cuda.synchronize()
    for parts, found in zip(rounds, sums, strict=True):
        want = ascending(parts)
        assert all(torch.equal(x, want) for x in found)


def test_replayed_sums_go_on_counting() -> None:
    """A graph holds no round number: each replay, and each sum between two of them, is a new one."""
    ranks = ranks_of(2, "cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    xs = [torch.zeros(4096, device="cuda") for _ in range(2)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for peers, stream, x, graph in zip(ranks, streams, xs, graphs, strict=True):
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(3):
                peer_sum(x, peers)
                x.mul_(0.5)
    torch.cuda.synchronize()
    for step in range(5):
        starts = [torch.randn(4096, device="cuda") for _ in range(2)]
        between = [torch.randn(CAPACITY, device="cuda") for _ in range(2)]
        want_between = ascending([b.clone() for b in between])
        for x, start in zip(xs, starts, strict=True):
            x.copy_(start)
        torch.cuda.synchronize()
        for peers, stream, graph, more in zip(ranks, streams, graphs, between, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                peer_sum(more, peers)
        torch.cuda.synchronize()
        want = (starts[0] + starts[1]) * 0.5  # then twice a sum of equal halves
        assert torch.equal(xs[0], want), step
        assert torch.equal(xs[1], want), step
        assert all(torch.equal(more, want_between) for more in between), step
