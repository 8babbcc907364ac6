"""One rank's life, the same in a plain process and in a Ray actor: join, load, answer steps, leave.

The main thread owns the worker and the data socket. A second thread owns the control socket: it answers
pings and dumps stacks while a step runs, and ends the process when its parent is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import zmq

from cluster.rank_start import RankStart, read_start
from cluster.transport import RankLink
from model.parallel.config import MeshCoord
from worker.config import WorkerConfig
from worker.protocol import CacheInfo, StepOutput, StepPlan
from worker.wire import (
    Channel,
    Done,
    DumpStacks,
    Failed,
    Hello,
    Join,
    Ping,
    Pong,
    Progress,
    Ready,
    Shutdown,
    Stacks,
    Step,
    StoreReady,
)

_LOG = logging.getLogger("causeway.rank")
_PROGRESS_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1


class Worker(Protocol):
    """What the rank asks of ``worker.worker.Worker``; tests bring their own."""

    def __init__(self, config: WorkerConfig, coord: MeshCoord, device_index: int) -> None: ...

    def init_distributed(self, init_method: str) -> None: ...

    def load(self, progress: Callable[[int, int], None]) -> None: ...

    def init_cache(self) -> CacheInfo: ...

    def warm_up(self) -> None: ...

    def execute(self, plan: StepPlan) -> StepOutput: ...

    def close(self) -> None: ...


class InjectedError(RuntimeError):
    """Raised by failpoint ``error``."""


class _Activity:
    """What the main thread is at, read by the control thread."""

    def __init__(self) -> None:
        self.phase = "start"
        self.step_id = -1


class _Control(threading.Thread):
    """Answers pings and stack requests; watches the parent."""

    def __init__(self, start: RankStart, activity: _Activity, parent_fd: int | None) -> None:
        super().__init__(name="control", daemon=True)
        self._start = start
        self._activity = activity
        self._parent_fd = parent_fd

    def run(self) -> None:
        """Serve until the process ends."""
        start = self._start
        link = RankLink(
            start.engine, start.key, start.rank, Channel.CONTROL, start.max_message_bytes
        )
        link.send(Hello(rank=start.rank, pid=os.getpid()))
        poller = zmq.Poller()
        poller.register(link.socket, zmq.POLLIN)
        if self._parent_fd is not None:
            poller.register(self._parent_fd, zmq.POLLIN)
        while True:
            events = dict(poller.poll())
            if self._parent_fd in events and not os.read(self._parent_fd or 0, 4096):
                os._exit(1)  # the pipe is closed: the engine's process is gone
            if link.socket not in events:
                continue
            message = link.receive(0)
            if isinstance(message, Ping):
                link.send(
                    Pong(
                        rank=start.rank,
                        number=message.number,
                        phase=self._activity.phase,
                        step_id=self._activity.step_id,
                    )
                )
            elif isinstance(message, DumpStacks):
                link.send(Stacks(rank=start.rank, text=_stacks()))


def run_rank(start: RankStart, *, parent_fd: int | None = None) -> int:
    """Live as one rank until the engine says Shutdown; returns the process's exit code.

    ``parent_fd`` is a pipe whose end of file means that the engine's process is gone.
    """
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C is for the engine, which ends the ranks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(start.env)
    activity = _Activity()
    _Control(start, activity, parent_fd).start()
    link = RankLink(start.engine, start.key, start.rank, Channel.DATA, start.max_message_bytes)
    link.send(Hello(rank=start.rank, pid=os.getpid()))
    try:
        worker, store = _bring_up(start, link, activity)
        _serve(start, link, activity, worker)
    except Exception as error:  # the process's edge: whatever it is, the engine must hear of it
        text = traceback.format_exc()
        _LOG.error("rank %d failed in %s\n%s", start.rank, activity.phase, text)
        link.send(
            Failed(
                rank=start.rank,
                phase=activity.phase,
                step_id=activity.step_id,
                detail=f"{type(error).__name__}: {error}",
                traceback=text,
            )
        )
        _wait_for_shutdown(link)
        link.close()
        return 1
    del store  # rank 0 serves it until here
    link.close()
    return 0


def _bring_up(start: RankStart, link: RankLink, activity: _Activity) -> tuple[Worker, Any]:
    """From nothing to Ready; returns the worker and, on rank 0, the store it must keep."""
    rank = start.rank

    @contextmanager
    def phase(name: str) -> Iterator[Callable[[int, int], None]]:
        activity.phase = name
        begin = sent = time.monotonic()
        link.send(Progress(rank=rank, phase=name, seconds=0.0, fraction=0.0))

        def progress(done: int, total: int) -> None:
            nonlocal sent
            now = time.monotonic()
            if now - sent >= _PROGRESS_EVERY_S and 0 <= done < total:
                sent = now
                link.send(
                    Progress(rank=rank, phase=name, seconds=now - begin, fraction=done / total)
                )

        yield progress
        seconds = time.monotonic() - begin
        link.send(Progress(rank=rank, phase=name, seconds=seconds, fraction=1.0))

    store: Any = None
    with phase("import"):
        worker_class = load_attribute(start.worker_class)
        rendezvous = importlib.import_module(start.store_module)
    with phase("join"):
        parallel = start.config.parallel
        if rank == 0:
            store, init_method = rendezvous.serve_store(start.store_host, start.start_deadline_s)
            link.send(StoreReady(init_method=init_method))
        message = link.receive()
        while not isinstance(message, Join):
            message = link.receive()
        coord = MeshCoord(cp=parallel.cp, tp=parallel.tp, rank=rank)
        worker: Worker = worker_class(start.config, coord, start.device_index)
        worker.init_distributed(message.init_method)
    with phase("load") as progress:
        worker.load(progress)
    with phase("cache"):
        info = worker.init_cache()
    with phase("warm-up"):
        worker.warm_up()
    activity.phase = "idle"
    link.send(Ready(rank=rank, info=info))
    return worker, store


def _serve(start: RankStart, link: RankLink, activity: _Activity, worker: Worker) -> None:
    while True:
        message = link.receive()
        if isinstance(message, Shutdown):
            activity.phase = "shutdown"
            worker.close()
            return
        if isinstance(message, Step):
            plan = message.plan
            activity.phase, activity.step_id = plan.phase, plan.step_id
            _fail_on_purpose(start, plan.step_id)
            output = worker.execute(plan)
            link.send(Done(output=output))
            activity.phase, activity.step_id = "idle", -1


def _wait_for_shutdown(link: RankLink) -> None:
    """Stay after a failure, so that this rank's exit hides no other rank's; the engine kills it."""
    while not isinstance(link.receive(), Shutdown):
        continue


def _fail_on_purpose(start: RankStart, step_id: int) -> None:
    for point in start.failpoints:
        if point.rank != start.rank or point.step != step_id:
            continue
        if point.generation not in (-1, start.generation):
            continue
        _LOG.warning("failpoint %s at step %d", point.kind, step_id)
        if point.kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif point.kind == "slow":
            time.sleep(point.seconds)
        elif point.kind == "error":
            raise InjectedError(f"failpoint error at step {step_id}")
        else:
            threading.Event().wait()


def load_attribute(name: str) -> Any:
    """The object named ``module:attribute``."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} must be module:attribute")
    return getattr(importlib.import_module(module), attribute)


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def main() -> int:
    """A plain process: the start message comes over stdin."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    faulthandler.enable()
    fd = sys.stdin.fileno()
    start = read_start(fd)
    if start.die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return run_rank(start, parent_fd=fd)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no exit hook of a library may hold a rank that is done
