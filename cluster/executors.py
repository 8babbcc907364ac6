"""Chooses the executor; Ray is imported only when it is used."""

from __future__ import annotations

import importlib

from cluster.config import ClusterConfig
from cluster.gang_executor import GangExecutor

EXECUTORS = {
    "local": ("cluster.local_executor", "LocalExecutor"),
    "ray": ("cluster.ray_executor", "RayExecutor"),
}


def make_executor(config: ClusterConfig, *, load_mtp: bool = False) -> GangExecutor:
    """The executor that ``cluster.executor`` names, not started yet.

    ``load_mtp`` loads the MTP block even when ``speculative.mtp`` is 0.
    """
    module, name = EXECUTORS[config.cluster.executor]
    executor = getattr(importlib.import_module(module), name)(config, load_mtp=load_mtp)
    if not isinstance(executor, GangExecutor):
        raise TypeError(f"{module}.{name} is no GangExecutor")
    return executor
