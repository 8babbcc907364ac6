"""Run a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ENV = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class RankError(RuntimeError):
    """A rank failed, died or hung; the message holds the first failure's traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank after ``init_process_group``.

    Args:
        fn: a function of a module's top level; what it returns must pickle.
        timeout: seconds until all ranks must have answered, process start included.

    Returns:
        The results by rank.

    Raises:
        RankError: the first rank's failure, with its traceback, or the ranks that did not answer.
    """
    deadline = time.monotonic() + timeout
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        saved = {key: os.environ.get(key) for key in _ENV}
        os.environ.update(_ENV)  # spawned processes inherit it before they import torch
        processes: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                process = context.Process(
                    target=_main, args=(fn, rank, world_size, args, folder, timeout), daemon=True
                )
                process.start()
                processes.append(process)
        finally:
            for key, value in saved.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
        try:
            _await(processes, deadline)
            return _collect(processes, Path(folder), timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _await(processes: list[BaseProcess], deadline: float) -> None:
    """Wait until all have ended, one has failed, or the time is over."""
    running = list(processes)
    while running and time.monotonic() < deadline:
        wait([p.sentinel for p in running], timeout=max(0.0, deadline - time.monotonic()))
        if any(p.exitcode not in (None, 0) for p in running):
            return
        running = [p for p in running if p.exitcode is None]


def _collect(processes: list[BaseProcess], folder: Path, timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    for rank in range(len(processes)):
        file = folder / f"rank{rank}.pickle"
        if file.exists():
            answers[rank] = pickle.loads(file.read_bytes())  # noqa: S301 - our own child wrote it
    failed = sorted((when, rank) for rank, (ok, when, _) in answers.items() if not ok)
    codes = {r: p.exitcode for r, p in enumerate(processes) if p.exitcode != 0}
    died = {r: code for r, code in codes.items() if code is not None and r not in answers}
    if failed:
        rank = failed[0][1]
        note = f" (ranks that died, by exit code: {died})" if died else ""
        raise RankError(f"rank {rank} failed first{note}:\n{answers[rank][2]}")
    if died:
        raise RankError(f"ranks died without an answer, exit codes by rank: {died}")
    if codes:
        raise RankError(f"ranks {sorted(codes)} did not finish within {timeout} s")
    return [answers[rank][2] for rank in range(len(processes))]


def _main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    folder: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ok = True
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        value = fn(rank, world, *args)
        dist.barrier()
        dist.destroy_process_group()
        answer = pickle.dumps((ok, time.monotonic(), value))
    except Exception:
        ok = False
        answer = pickle.dumps((ok, time.monotonic(), traceback.format_exc()))
    part = Path(folder) / f"rank{rank}.part"
    part.write_bytes(answer)
    part.rename(Path(folder) / f"rank{rank}.pickle")
    if not ok:
        os._exit(1)  # gloo's threads may hang in destructors once a peer is gone
