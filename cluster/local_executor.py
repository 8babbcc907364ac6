"""``cluster.executor: local``: one plain process per rank on this machine, loopback only."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from cluster.config import ClusterConfig
from cluster.executor import Report
from cluster.gang_executor import GangExecutor
from cluster.launcher import Placement
from cluster.process_state import describe_exit, log_tail, process_stopped
from cluster.rank_env import import_path, rank_env
from cluster.rank_start import STORE_MODULE, WORKER_CLASS, RankStart, write_start

_LOG = logging.getLogger("causeway.local")

LOOPBACK = "127.0.0.1"
_KILL_WAIT_S = 2.0


class LocalLauncher:
    """Starts ``python -m cluster.rank_process``; the start message goes over stdin."""

    notice_s = 0.3

    def __init__(self, config: ClusterConfig) -> None:
        self._world = config.parallel.world
        self._device = config.device
        self._log_dir = config.cluster.log_dir
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def place(self, report: Report) -> Placement:
        """Every rank on this machine; rank r uses device r."""
        report(f"starting {self._world} local rank(s)")
        return Placement(
            engine_host=LOOPBACK,
            store_host=LOOPBACK,
            device=self._device,
            devices=tuple(range(self._world)),
            env=rank_env(os.environ, ranks_per_node=self._world, one_machine=True),
        )

    def launch(self, starts: Sequence[RankStart]) -> None:
        """Start the processes, each in a session of its own, so that Ctrl-C does not reach them."""
        # PDEATHSIG follows the starting thread: only the main thread lives as long as the process.
        main = threading.current_thread() is threading.main_thread()
        for start in starts:
            with self._log(start.rank).open("ab") as log:
                process = self._spawn(log)
            self._processes.append(process)
            if process.stdin is None:
                raise OSError("no pipe to the rank's process")
            with contextlib.suppress(BrokenPipeError):  # it died at once: ``ended`` will tell
                write_start(process.stdin, msgspec.structs.replace(start, die_with_parent=main))

    def ended(self) -> dict[int, str]:
        """Rank -> exit code or signal."""
        return {
            rank: describe_exit(process.returncode)
            for rank, process in enumerate(self._processes)
            if process.poll() is not None
        }

    def evidence(self, rank: int) -> str:
        """Whether the process is stopped; its last output when it died."""
        if rank >= len(self._processes):
            return ""
        process = self._processes[rank]
        if process.poll() is None:
            return "its process is stopped" if process_stopped(process.pid) else ""
        tail = log_tail(self._log(rank))
        return f"last output: {tail}" if tail else ""

    def kill(self) -> None:
        """SIGKILL to every rank's session; it also ends a stopped process."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            try:
                process.wait(_KILL_WAIT_S)
            except subprocess.TimeoutExpired:
                _LOG.error("process %d does not die", process.pid)
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        self._processes = []

    def close(self) -> None:
        """Kill what is left and remove the temporary logs."""
        self.kill()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.rank_process"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": import_path(os.environ)},
        )

    def _log(self, rank: int) -> Path:
        if self._log_dir:
            folder = Path(self._log_dir)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="causeway-")
            folder = Path(self._temporary.name)
        return folder / f"rank{rank}.log"


class LocalExecutor(GangExecutor):
    """Runs the ranks as plain processes: tests, debugging, ``score``."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        load_mtp: bool = False,
        worker_class: str = WORKER_CLASS,
        store_module: str = STORE_MODULE,
    ) -> None:
        super().__init__(
            config,
            LocalLauncher(config),
            load_mtp=load_mtp,
            worker_class=worker_class,
            store_module=store_module,
        )
