"""Several row streams through one all-gather: the buffers of the exchanges one by one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.forward_batch import RowExchange
from model.parallel.collectives import Group
from model.parallel.context import exchange_streams, gather_entries, row_stream
from tests.helpers.ranks import run_ranks

NONE = torch.empty(0, dtype=torch.int64)


def one_by_one(
    cp: Group, local: Tensor, send: Tensor | None, counts: tuple[int, ...], carried: Tensor
) -> Tensor:
    """A stream's buffer through a collective of its own."""
    sent = local if send is None else local[send]
    gathered = cp.all_gather_v(sent, counts)
    return gathered if send is None else torch.cat([local, gathered, carried])


def exchange(rank: int, world: int) -> tuple[int, int]:
    cp = Group(dist.group.WORLD, world, rank)
    torch.manual_seed(rank)
    latents, rows = torch.randn(9, 6).bfloat16(), torch.randn(9, 5)
    entries, keys = torch.randn(rank + 1, 4).bfloat16(), torch.randn(rank + 1, 2).bfloat16()
    ring, state = torch.randn(8, 6).bfloat16(), torch.randn(8, 5)
    counts = [(3,) + (0,) * (world - 1), tuple(range(1, world + 1))]
    plans = [
        RowExchange(
            send=torch.randint(0, 9, (c[rank],)),
            counts=c,
            carried=torch.tensor([5, 1]),
            state_source=NONE,
            state_dest=NONE,
            tail_source=NONE,
            tail_dest=NONE,
        )
        for c in counts
    ]
    want = (
        one_by_one(cp, latents, plans[0].send, counts[0], ring[plans[0].carried]),
        one_by_one(cp, rows, plans[1].send, counts[1], state[plans[1].carried]),
        one_by_one(cp, entries, None, counts[1], entries),
        one_by_one(cp, keys, None, counts[1], keys),
    )
    before = cp.stats.calls
    got = exchange_streams(
        cp,
        (
            row_stream(latents, plans[0], ring[plans[0].carried], None),
            row_stream(rows, plans[1], state, plans[1].carried),
        ),
    ) + gather_entries(cp, (entries, keys), counts[1])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    return before, cp.stats.calls - before


def test_streams_travel_together() -> None:
    assert run_ranks(exchange, 3) == [(4, 2)] * 3
