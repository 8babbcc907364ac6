"""The only Ray actor: a thin shell around ``run_rank``, one per rank."""

from __future__ import annotations

import logging
import os

import msgspec
import ray

from cluster.rank_process import run_rank
from cluster.rank_start import decode_start


class ActorPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where Ray put an actor."""

    node_id: str
    node_ip: str
    pid: int
    device_index: int  # -1 without a GPU


@ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1)
class RankActor:
    """Holds a process on the right machine with the right GPU; steps do not pass through Ray."""

    def place(self) -> bytes:
        """The ActorPlace, as msgpack."""
        devices = ray.get_gpu_ids()
        place = ActorPlace(
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            pid=os.getpid(),
            device_index=_device_index(str(devices[0])) if devices else -1,
        )
        return msgspec.msgpack.encode(place)

    def run(self, start: bytes) -> int:
        """Be a rank until it ends; the call that never returns while all is well is the sentinel."""
        logging.basicConfig(level=logging.INFO)
        return run_rank(decode_start(start))


def _device_index(device: str) -> int:
    """Ray names a device as CUDA_VISIBLE_DEVICES does; torch counts within that list."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names.index(device) if device in names else int(device)
