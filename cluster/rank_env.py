"""Environment variables of a rank: the only place that sets them, all before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Variables of the communication libraries that reach the ranks of every machine as they are set here.
PASSED_ON = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_GLOO_")


def import_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH of a rank: the repository first, then what is there already."""
    known = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join([str(ROOT), *(part for part in known if part != str(ROOT))])


def rank_env(
    environ: Mapping[str, str], *, ranks_per_node: int, one_machine: bool
) -> dict[str, str]:
    """Variables that a rank sets for itself.

    A world on one machine talks over the loopback interface only, unless an interface was named.
    """
    env = {name: value for name, value in environ.items() if name.startswith(PASSED_ON)}
    threads = environ.get("OMP_NUM_THREADS", "")
    env["OMP_NUM_THREADS"] = threads or str(max(1, _cores() // ranks_per_node))
    if one_machine and (loopback := _loopback_interface()):
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)
        env.setdefault("NCCL_SOCKET_IFNAME", loopback)
    return env


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _loopback_interface() -> str:
    return {"linux": "lo", "darwin": "lo0"}.get(sys.platform, "")
