"""Sums through tagged boxes: threads as ranks, round after round, in sizes that change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels import KernelContractError, PeerBoxes, box_bytes, peer_sum
from kernels.peer_sum.api import BLOCKS, CAPACITY, MOST_RANKS
from tests.helpers.strided import microseconds

SIZES = (4096, 2, 510, CAPACITY, 514, 4096, 8)


def ranks_of(size: int, device: torch.device | str = "cpu") -> list[PeerBoxes]:
    """Every rank's view of the boxes of ``size`` ranks in one memory."""
    boxes = tuple(
        torch.zeros(box_bytes(size), dtype=torch.uint8, device=device) for _ in range(size)
    )
    return [
        PeerBoxes(
            boxes=boxes,
            rank=rank,
            rounds=torch.zeros(BLOCKS, dtype=torch.int32, device=device),
        )
        for rank in range(size)
    ]


def ascending(parts: list[Tensor]) -> Tensor:
    """The sum as it is defined."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("size", [2, 3, 4, MOST_RANKS])
def test_all_ranks_get_the_bits_of_an_ascending_sum(size: int) -> None:
    torch.manual_seed(size)
    rounds = [[torch.randn(n) * 10.0**r for r in range(size)] for n in SIZES]

    def rank_sums(peers: PeerBoxes) -> list[Tensor]:
        return [peer_sum(parts[peers.rank].clone(), peers) for parts in rounds]

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank_sums, ranks_of(size)))
    for i, parts in enumerate(rounds):
        for of_rank in results:
            assert torch.equal(of_rank[i], ascending(parts))


def test_a_sum_is_made_in_place_and_nothing_is_a_sum() -> None:
    (a, b) = ranks_of(2)
    x, nothing = torch.ones(2, 3), torch.ones(0)
    assert peer_sum(nothing, a) is nothing
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(peer_sum, torch.full((2, 3), 2.0), b)
        assert peer_sum(x, a) is x
        other.result()
    assert torch.equal(x, torch.full((2, 3), 3.0))
    assert a.rounds[:2].tolist() == [1, 0]


def test_bad_inputs_are_refused() -> None:
    (peers, _) = ranks_of(2)
    for x, message in (
        (torch.zeros(3), "even number"),
        (torch.zeros(CAPACITY + 2), "even number"),
        (torch.zeros(4, 4)[:, ::2].contiguous()[:, :1], "contiguous"),
        (torch.zeros(4, dtype=torch.bfloat16), "float32"),
        (torch.zeros(4, dtype=torch.float64), "float32"),
    ):
        with pytest.raises(KernelContractError, match=message):
            peer_sum(x, peers)
    alone = PeerBoxes(boxes=peers.boxes[:1], rank=0, rounds=peers.rounds)
    with pytest.raises(KernelContractError, match=r"expected 2\.\.8 boxes, got 1"):
        peer_sum(torch.zeros(4), alone)


@pytest.mark.benchmark
def test_time_of_two_threads() -> None:
    (a, b) = ranks_of(2)
    x, y = torch.randn(4096), torch.randn(4096)
    with ThreadPoolExecutor(1) as pool:

        def both() -> None:
            other = pool.submit(peer_sum, y, b)
            peer_sum(x, a)
            other.result()

        print(f"peer_sum twin, 2 threads, 4096 values: {microseconds(both):.0f} us")
