"""Several row streams through one all-gather: the buffers of the exchanges one by one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kernels import RowStream
from model.forward_batch import RowExchange
from model.parallel.collectives import Group
from model.parallel.context import exchange_rows, exchange_streams, gather_entries
from tests.helpers.ranks import run_ranks

NONE = torch.empty(0, dtype=torch.int64)


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
        exchange_rows(cp, latents, plans[0], ring[plans[0].carried]),
        exchange_rows(cp, rows, plans[1], state[plans[1].carried]),
        gather_entries(cp, entries, counts[1]),
        gather_entries(cp, keys, counts[1]),
    )
    before = cp.stats.calls
    got = exchange_streams(
        cp,
        (
            *(
                RowStream(
                    local=local,
                    send=plan.send,
                    counts=plan.counts,
                    carried=kept,
                    carried_index=plan.carried,
                )
                for local, plan, kept in ((latents, plans[0], ring), (rows, plans[1], state))
            ),
            RowStream(local=entries, counts=counts[1], keep_local=False),
            RowStream(local=keys, counts=counts[1], keep_local=False),
        ),
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    return before, cp.stats.calls - before


def test_streams_travel_in_one_collective() -> None:
    assert run_ranks(exchange, 3) == [(4, 1)] * 3
