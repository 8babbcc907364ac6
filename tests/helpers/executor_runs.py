"""Executors over fake ranks, in this process and in an engine process of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import WorkerFailure
from cluster.gang_executor import GangExecutor
from tests.helpers.cluster_faces import plan

FAKE = "tests.helpers.fake_worker:"
STORE = "tests.helpers.fake_store"


def quiet(line: str) -> None:
    """Reports of a start that nobody reads."""
    return


def failure(executor: GangExecutor, step_id: int) -> tuple[WorkerFailure, float]:
    """How a step failed, and after how many seconds."""
    begin = time.monotonic()
    with pytest.raises(WorkerFailure) as error:
        executor.execute(plan(step_id))
    return error.value, time.monotonic() - begin


# Tests that a shell runs in the background inherit an ignored SIGINT; `launch.py` undoes that too.
_HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


@contextmanager
def engine_process(
    code: str, folder: Path, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Python that runs an engine, started in a folder that knows nothing of the repository."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HEARS_CTRL_C + code],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    stream: Any = process.stdout
    return str(stream.readline()).strip()
