"""A rank of its own, in this process."""

from __future__ import annotations

from model.parallel.config import MeshCoord
from worker.config import WorkerConfig
from worker.worker import Worker


def started(config: WorkerConfig) -> Worker:
    """The only rank of a world, ready for steps. Whoever asks for it closes it."""
    worker = Worker(config, MeshCoord(cp=1, tp=1, rank=0))
    worker.init_distributed("")
    worker.load()
    worker.init_cache()
    worker.warm_up()
    return worker
