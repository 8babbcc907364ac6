"""What the executor tests share: a small config, a plan, and looks at processes and sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.config import ClusterConfig, load_config
from worker.protocol import PrefillSlice, SamplingParams, SlotInit, StepPlan

LISTEN = "0A"


def config(*overrides: str) -> ClusterConfig:
    base = (
        "device=cpu",
        "parallel.cp=2",
        "cluster.executor=local",
        "cluster.start_deadline_s=60",
        "cluster.heartbeat_s=0.1",
    )
    return load_config(None, [*base, *overrides])


def plan(step_id: int, tokens: tuple[int, ...] = (1, 2, 3)) -> StepPlan:
    return StepPlan(
        step_id=step_id,
        phase="prefill",
        inits=[SlotInit(request_id=1, slot=0, sampling=SamplingParams(), num_prompt_tokens=3)],
        prefill=[PrefillSlice(request_id=1, slot=0, start=0, token_ids=list(tokens), sample=True)],
    )


def descendants(pid: int) -> set[int]:
    """Every living process below ``pid``."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if stat[0] != "Z":
                parents[int(entry.name)] = int(stat[1])
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def wait_gone(pids: set[int], seconds: float) -> set[int]:
    """The processes that are still there after that time."""
    until = time.monotonic() + seconds
    while (left := {pid for pid in pids if _alive(pid)}) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def listening(pids: set[int]) -> Iterator[str]:
    """Local addresses (hex, as in /proc/net) on which the processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(fd)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                yield fields[1].partition(":")[0]


def is_loopback(address: str) -> bool:
    if len(address) == 8:
        return address.endswith("7F")  # 127.x.y.z, stored low byte first
    return address in ("00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
