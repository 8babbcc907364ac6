"""Ray actors as ranks. One test session starts Ray once; two tests start one of their own, whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.config import RayConfig
from cluster.errors import WorkerFailure
from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import RayRuntime
from tests.helpers.cluster_faces import (
    config,
    descendants,
    is_loopback,
    listening,
    plan,
    wait_gone,
)
from tests.helpers.executor_runs import FAKE, STORE, engine_process, failure, quiet, read_line

pytestmark = pytest.mark.ray


Make = Callable[..., RayExecutor]


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[RayRuntime]:
    """A Ray of four CPUs; executors find it running and leave it running."""
    before = descendants(os.getpid())
    runtime = RayRuntime(RayConfig(), cpus=4, cpu_only=True)
    runtime.ensure()
    processes = descendants(os.getpid()) - before
    yield runtime
    runtime.stop()
    assert not wait_gone(processes, 5)


@pytest.fixture
def make(shared_ray: RayRuntime) -> Iterator[Make]:
    """Builds executors and sees to it that their actors and their reservation are gone."""
    made: list[RayExecutor] = []

    def build(*overrides: str, worker: str = "FakeWorker", store: str = STORE) -> RayExecutor:
        executor = RayExecutor(
            config("cluster.executor=ray", *overrides),
            worker_class=FAKE + worker,
            store_module=store,
        )
        made.append(executor)
        return executor

    yield build
    for executor in made:
        executor.shutdown()
    assert ray.is_initialized()  # it was not theirs
    assert not wait_gone(actors(), 2)
    until = time.monotonic() + 5
    while shared_ray.free("CPU") < 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert shared_ray.free("CPU") == 4


def actors() -> set[int]:
    """Processes that are ranks."""
    return actors_below(os.getpid())


def actors_below(top: int) -> set[int]:
    found = set()
    for pid in descendants(top):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if command.startswith("ray::RankActor"):
            found.add(pid)
    return found


def pid_of(rank: int, folder: Path) -> int:
    """Ranks tell their pid in the facts they print; here through a file."""
    return int((folder / f"pid{rank}").read_text())


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    monkeypatch.setenv("GLOO_TEST_PID_DIR", str(tmp_path))  # GLOO_ variables reach the ranks
    return lambda rank: pid_of(rank, tmp_path)


def test_steps_and_a_killed_rank(
    make: Make, pids: Callable[[int], int], capfd: pytest.CaptureFixture[str]
) -> None:
    executor = make(worker="PidWorker")
    lines: list[str] = []
    assert executor.start(lines.append).num_blocks == 8
    assert any(line.startswith("Ray at ") for line in lines)
    assert any("rank 1  warm-up" in line for line in lines)
    for step in range(3):
        assert executor.execute(plan(step, (step, 10))).outputs[0].token_ids == [step + 10]
    assert len(actors()) == 2
    os.kill(pids(1), signal.SIGKILL)
    error, seconds = failure(executor, 5)
    assert seconds < 1
    assert (error.rank, error.phase, error.step_id) == (1, "prefill", 5)
    assert "died" in error.detail
    assert not wait_gone(actors(), 1)
    begin = time.monotonic()
    executor.restart(quiet)
    assert time.monotonic() - begin < 15
    assert executor.execute(plan(6)).step_id == 6
    assert capfd.readouterr().out == ""  # stdout is for results


def test_a_stopped_rank(make: Make, pids: Callable[[int], int]) -> None:
    executor = make("cluster.heartbeat_timeout_s=0.5", worker="PidWorker")
    executor.start(quiet)
    stopped = pids(1)
    os.kill(stopped, signal.SIGSTOP)
    error, seconds = failure(executor, 1)
    assert error.rank == 1
    assert "heartbeat" in error.detail
    assert "its process is stopped" in error.detail
    assert seconds < 6
    assert not wait_gone({stopped}, 0)
    executor.restart(quiet)
    assert executor.execute(plan(2)).step_id == 2


def test_an_exception_in_a_step_and_loopback_only(make: Make, pids: Callable[[int], int]) -> None:
    executor = make(
        "cluster.failpoints=[{kind: error, rank: 0, step: 3}]",
        worker="PidWorker",
        store="worker.rendezvous",
    )
    executor.start(quiet)
    ours = RayPorts(pids(0)), RayPorts(pids(1)), RayPorts(os.getpid())
    assert ours[0].loopback >= 1  # rank 0 serves the store
    assert ours[2].loopback >= 1  # the engine's ROUTER
    # Ray itself opens one port per process on every interface; none of ours adds to that.
    assert all(port.open <= 1 for port in ours)
    error, _ = failure(executor, 3)
    assert (error.rank, error.detail) == (0, "InjectedError: failpoint error at step 3")


class RayPorts:
    """How many sockets a process listens on, by where they can be reached from."""

    def __init__(self, pid: int) -> None:
        addresses = list(listening({pid}))
        self.loopback = sum(is_loopback(address) for address in addresses)
        self.open = len(addresses) - self.loopback


def test_more_ranks_than_ray_has_room_for(make: Make) -> None:
    executor = make("parallel.cp=5", "cluster.start_deadline_s=1")
    with pytest.raises(WorkerFailure, match=r"no room for 1 x .*CPU.*5"):
        executor.start(quiet)


def test_cuda_where_there_is_none(make: Make) -> None:
    with pytest.raises(WorkerFailure, match="needs 2 GPUs, Ray has 0"):
        make("device=cuda").start(quiet)


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.helpers.cluster_faces import config, plan
from cluster.ray_executor import RayExecutor

executor = RayExecutor(
    config("cluster.executor=ray", "cluster.ray.temp_dir={temp}"),
    worker_class={worker!r},
    store_module={store!r},
)
try:
    executor.start(lambda line: print(line, file=sys.stderr))
    executor.execute(plan(1))
    print("ready", flush=True)
    time.sleep(60)
finally:
    begin = time.monotonic()
    executor.shutdown()
    print("down", time.monotonic() - begin, flush=True)
"""


@pytest.fixture
def engine(repo_root: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An engine process with a Ray of its own, in a folder that knows nothing of the repository."""
    temp = tempfile.mkdtemp(prefix="cw", dir="/tmp")  # short: Ray keeps sockets in it
    text = SCRIPT.format(root=str(repo_root), worker=f"{FAKE}FakeWorker", store=STORE, temp=temp)
    env = {n: v for n, v in os.environ.items() if n != "PYTHONPATH" and not n.startswith("RAY_")}
    with engine_process(text, tmp_path, env) as process:
        yield process
    shutil.rmtree(temp, ignore_errors=True)


def test_nothing_is_left_of_a_ray_of_our_own(engine: subprocess.Popen[str]) -> None:
    assert read_line(engine) == "ready"
    processes = descendants(engine.pid)
    assert len(processes) > 3  # gcs_server, raylet, agents, two ranks
    os.killpg(engine.pid, signal.SIGINT)
    word, seconds = read_line(engine).split()
    assert word == "down"
    assert float(seconds) < 5
    engine.wait(5)
    assert not wait_gone(processes, 1)


@pytest.mark.full
def test_ranks_end_with_a_killed_engine(engine: subprocess.Popen[str]) -> None:
    """Ray's own agents stay for up to a minute and a half; the ranks, raylet and GCS must not."""
    assert read_line(engine) == "ready"
    processes, ranks = descendants(engine.pid), actors_below(engine.pid)
    assert len(ranks) == 2
    engine.kill()
    engine.wait()
    try:
        assert not wait_gone(ranks, 10)
    finally:
        for pid in wait_gone(processes, 0):
            os.kill(pid, signal.SIGKILL)
