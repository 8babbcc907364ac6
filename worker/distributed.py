"""Process groups of one rank: joining the world, leaving it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from kernels.platform import dist_backend
from model.parallel.config import ParallelConfig
from model.parallel.mesh import ParallelMesh, build_mesh
from worker.rendezvous import join_as_client


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
    return build_mesh(parallel, rank)


def leave_world() -> None:
    """Give up the process groups; nothing happens when there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()
