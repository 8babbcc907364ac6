"""Sums of small tensors over the GPUs of one machine: peer memory against NCCL, inside CUDA graphs.

    python -m benchmarks.small_sums [--columns 4096] [--rows 1 8 32 64]

One process per GPU. Prints rank 0's median per sum, and whether all ranks got the same bits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from model.parallel.config import ParallelConfig
from worker.distributed import join_world, leave_world
from worker.rendezvous import serve_store

SUMS = 50  # in one graph
REPEATS = 5


def graph_us(call: Callable[[], object]) -> float:
    """Median microseconds of one call, of ``SUMS`` in a graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(SUMS):
            call()
    times = []
    for _ in range(REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()  # type: ignore[no-untyped-call]
        graph.replay()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / SUMS)  # type: ignore[no-untyped-call]
    return statistics.median(times[2:])


def run_rank(rank: int, world: int, init_method: str, args: argparse.Namespace) -> None:
    """One rank's process."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    mesh = join_world(ParallelConfig(cp=world), rank, init_method, device, 120)
    peers, group = mesh.world.peers, mesh.world
    if peers is None:
        raise SystemExit("no peer memory here: the ranks do not share a machine")
    for rows in args.rows:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(rank)
            x = torch.randn(rows * args.columns, device=device).to(dtype)
            mine = x.clone()
            peers.all_reduce(mine)
            gathered = group.all_gather(mine[None])
            same = all(torch.equal(gathered[0], other) for other in gathered)
            zeros: Tensor = torch.zeros_like(x)
            by_peers = graph_us(lambda z=zeros: peers.all_reduce(z))  # type: ignore[misc]
            by_nccl = graph_us(lambda z=zeros: dist.all_reduce(z))  # type: ignore[misc]
            if rank == 0:
                print(
                    f"{rows} x {args.columns} {dtype}: peer memory {by_peers:.1f} us, NCCL"
                    f" {by_nccl:.1f} us, same bits on all ranks: {same}",
                    flush=True,
                )
    leave_world()


def main() -> None:
    """Parse arguments, start the ranks, wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    args = parser.parse_args()
    store, init_method = serve_store("127.0.0.1", 120)
    world = torch.cuda.device_count()
    mp.spawn(run_rank, args=(world, init_method, args), nprocs=world)
    del store  # it must outlive the ranks


if __name__ == "__main__":
    main()
