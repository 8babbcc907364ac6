"""Process groups of one rank: joining the world, leaving it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.platform import dist_backend
from model.parallel.collectives import Group
from model.parallel.config import ParallelConfig
from model.parallel.mesh import ParallelMesh, build_mesh
from model.parallel.peer_memory import PeerReducer
from worker.rendezvous import join_as_client

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one for every start of a machine
_SMALL_SUM = 1 << 20  # bytes up to which reading the peers beats NCCL


def join_world(
    parallel: ParallelConfig, rank: int, init_method: str, device: torch.device, timeout_s: float
) -> ParallelMesh:
    """Join the world at ``init_method`` (``tcp://host:port`` of a store that is already served).

    Args:
        timeout_s: after this long a collective gives up; the engine's step deadline ends it earlier.
    """
    if parallel.world == 1:
        return ParallelMesh.single()
    join_as_client()
    dist.init_process_group(
        dist_backend(device),
        init_method=init_method,
        world_size=parallel.world,
        rank=rank,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    mesh = build_mesh(parallel, rank)
    if device.type == "cuda" and parallel.peer_memory and _one_machine():
        _use_peer_memory((mesh.tp, mesh.world), device)
    return mesh


def _use_peer_memory(groups: Sequence[Group], device: torch.device) -> None:
    """Give each group its reducer; groups of the same ranks share one. Collective."""
    made: list[tuple[dist.ProcessGroup, PeerReducer]] = []
    for group in groups:
        ranks = group.process_group
        if group.size == 1 or ranks is None:
            continue
        group.peers = next((reducer for known, reducer in made if known is ranks), None)
        if group.peers is None:
            group.peers = PeerReducer(ranks, device, _SMALL_SUM)
            made.append((ranks, group.peers))


def _one_machine() -> bool:
    """Whether all ranks run under one kernel; collective."""
    here = _BOOT_ID.read_text().strip()
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return len(set(everywhere)) == 1


def leave_world() -> None:
    """Give up the process groups; nothing happens when there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()
