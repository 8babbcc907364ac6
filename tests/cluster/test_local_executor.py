"""Plain rank processes: start, steps, every way to lose a rank, rebuild, and an empty house after."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.errors import WorkerFailure
from cluster.executors import make_executor
from cluster.local_executor import LocalExecutor
from cluster.rank_start import RankStart, read_start, write_start
from tests.helpers.cluster_faces import (
    config,
    descendants,
    is_loopback,
    listening,
    plan,
    wait_gone,
)
from tests.helpers.executor_runs import FAKE, STORE, engine_process, failure, quiet, read_line

Make = Callable[..., LocalExecutor]


@pytest.fixture
def make() -> Iterator[Make]:
    """Builds executors over fake ranks and sees to it that nothing of them is left."""
    before = descendants(os.getpid())
    made: list[LocalExecutor] = []

    def build(*overrides: str, worker: str = "FakeWorker", store: str = STORE) -> LocalExecutor:
        executor = LocalExecutor(config(*overrides), worker_class=FAKE + worker, store_module=store)
        made.append(executor)
        return executor

    yield build
    for executor in made:
        executor.shutdown()
    assert not wait_gone(descendants(os.getpid()) - before, 2)


def ranks() -> list[int]:
    """The rank processes of this test, in rank order (they are started in that order)."""
    return sorted(descendants(os.getpid()))


def test_start_report_steps_and_shutdown(make: Make) -> None:
    executor = make()
    lines: list[str] = []
    info = executor.start(lines.append)
    assert (info.num_blocks, info.allocated_bytes) == (8, 1000)
    for rank in (0, 1):
        for phase in ("import", "join", "load", "cache", "warm-up"):
            assert any(f"rank {rank}  {phase}" in line and line.endswith(" s") for line in lines)
    for step in range(5):
        output = executor.execute(plan(step, (step, 10)))
        assert (output.step_id, output.rank) == (step, 0)
        assert output.outputs[0].token_ids == [step + 10]
    executor.check()
    processes = set(ranks())
    assert len(processes) == 2
    begin = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - begin < 5
    assert not wait_gone(processes, 0)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="not been started"):
        executor.execute(plan(9))


def test_a_killed_rank_is_named_within_a_second_and_rebuilt(make: Make) -> None:
    executor = make()
    executor.start(quiet)
    executor.execute(plan(0))
    for life in range(2):
        victim = ranks()[1]
        others = set(ranks()) - {victim}
        os.kill(victim, signal.SIGKILL)
        error, seconds = failure(executor, 1 + life)
        assert seconds < 1
        assert (error.rank, error.phase, error.step_id) == (1, "prefill", 1 + life)
        assert "killed by signal 9 (SIGKILL)" in error.detail
        assert "fake weights loaded" in error.detail  # what it said last
        assert not wait_gone(others, 1)  # one lost rank ends them all
        with pytest.raises(WorkerFailure):
            executor.execute(plan(50))
        info = executor.restart(quiet)
        assert info.num_blocks == 8
        assert executor.execute(plan(60)).step_id == 60


def test_a_rank_killed_while_idle_is_found_by_check(make: Make) -> None:
    executor = make()
    executor.start(quiet)
    os.kill(ranks()[0], signal.SIGKILL)
    time.sleep(0.3)
    with pytest.raises(WorkerFailure, match=r"rank 0 failed in idle: killed by signal 9"):
        executor.check()


def test_a_crash_during_a_step(make: Make) -> None:
    executor = make("cluster.failpoints=[{kind: crash, rank: 0, step: 3}]")
    executor.start(quiet)
    executor.execute(plan(2))
    error, seconds = failure(executor, 3)
    assert (error.rank, error.step_id) == (0, 3)
    assert seconds < 1
    executor.restart(quiet)
    assert executor.execute(plan(3)).step_id == 3  # failpoints belong to one life


def test_a_failpoint_of_every_life(make: Make) -> None:
    executor = make("cluster.failpoints=[{kind: error, rank: 0, step: 3, generation: -1}]")
    executor.start(quiet)
    failure(executor, 3)
    executor.restart(quiet)
    assert "InjectedError" in failure(executor, 3)[0].detail


def test_an_exception_in_a_step_carries_its_text(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make("cluster.failpoints=[{kind: error, rank: 1, step: 3}]")
    executor.start(quiet)
    with caplog.at_level(logging.ERROR):
        error, seconds = failure(executor, 3)
    assert error.rank == 1
    assert error.detail == "InjectedError: failpoint error at step 3"
    assert seconds < 1.5
    assert "Traceback (most recent call last)" in caplog.text


def test_a_stopped_rank_is_named_by_its_heartbeat(make: Make) -> None:
    executor = make("cluster.heartbeat_timeout_s=0.5")
    executor.start(quiet)
    executor.execute(plan(0))
    os.kill(ranks()[1], signal.SIGSTOP)
    error, seconds = failure(executor, 1)
    assert (error.rank, error.phase, error.step_id) == (1, "prefill", 1)
    assert "heartbeat timeout of 0.5 s" in error.detail
    assert "its process is stopped" in error.detail
    assert seconds < 5  # 0.5 s of silence, 2 s for the stacks it cannot give
    executor.restart(quiet)
    executor.execute(plan(2))


def test_a_hung_rank_is_named_at_the_step_deadline_and_stacks_are_logged(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make(
        "cluster.failpoints=[{kind: hang, rank: 1, step: 4}]",
        "cluster.step_deadline_s=0.5",
        "cluster.heartbeat_timeout_s=0.2",  # a hung main thread still answers pings
    )
    executor.start(quiet)
    with caplog.at_level(logging.ERROR):
        error, seconds = failure(executor, 4)
    assert error.rank == 1
    assert (
        "hung: no answer within the step deadline of 0.559 s" in error.detail
    )  # + 3 tokens' share
    assert 0.5 < seconds < 3
    assert "stacks of rank 0" in caplog.text
    assert "_fail_on_purpose" in caplog.text


def test_a_slow_rank_is_no_failure(make: Make) -> None:
    executor = make("cluster.failpoints=[{kind: slow, rank: 1, step: 1, seconds: 0.7}]")
    executor.start(quiet)
    begin = time.monotonic()
    executor.execute(plan(1))
    assert time.monotonic() - begin > 0.7


def test_long_prompts_get_more_time(make: Make) -> None:
    executor = make(
        "cluster.failpoints=[{kind: slow, rank: 0, step: 1, seconds: 1.0}]",
        "cluster.step_deadline_s=0.2",
        "cluster.prefill_deadline_s_per_1k=2",
    )
    executor.start(quiet)
    executor.execute(plan(1, (1,) * 1024))


def test_a_rank_that_cannot_load(make: Make) -> None:
    executor = make(worker="LoadError")
    begin = time.monotonic()
    with pytest.raises(WorkerFailure) as error:
        executor.start(quiet)
    assert (error.value.rank, error.value.phase, error.value.step_id) == (1, "load", -1)
    assert "ValueError: tensor layers.0.attn.wq_a.weight is missing" in error.value.detail
    assert time.monotonic() - begin < 10
    assert not ranks()


def test_a_start_that_takes_too_long(make: Make) -> None:
    executor = make("cluster.start_deadline_s=1", "parallel.cp=1", worker="SlowLoad")
    with pytest.raises(WorkerFailure, match=r"rank 0 failed in load: hung: .*start_deadline_s"):
        executor.start(quiet)
    assert not ranks()


def test_ranks_that_allocate_different_caches(make: Make) -> None:
    with pytest.raises(WorkerFailure, match="allocated num_blocks 9, rank 0 8"):
        make(worker="Uneven").start(quiet)


def test_a_worker_that_is_not_there(make: Make) -> None:
    with pytest.raises(WorkerFailure, match=r"failed in import: .*NoSuchWorker"):
        make(worker="NoSuchWorker").start(quiet)


def test_an_answer_that_is_too_large_is_an_error_not_silence(make: Make) -> None:
    executor = make("cluster.max_message_bytes=1048576")
    executor.start(quiet)
    big = msgspec.structs.replace(
        plan(1), prefill=[msgspec.structs.replace(plan(1).prefill[0], start=1 << 20)]
    )  # the fake answers with that many bytes
    with pytest.raises(WorkerFailure, match=r"rank 0 .*cluster.max_message_bytes"):
        executor.execute(big)


def test_a_rank_that_does_not_leave_is_killed(make: Make) -> None:
    executor = make(worker="StuckAtClose")
    executor.start(quiet)
    begin = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - begin < 5
    assert not ranks()


def test_sockets_are_loopback_only(make: Make) -> None:
    """With the real store; ZMQ and TCPStore are ours."""
    executor = make(store="worker.rendezvous")
    executor.start(quiet)
    found = list(listening({os.getpid(), *ranks()}))
    assert len(found) >= 2
    assert all(is_loopback(address) for address in found), found


def test_facts_of_a_rank(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own session, own device, threads shared out, log in the named folder, key on no command line."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.chdir(tmp_path)
    executor = make("cluster.log_dir=logs", "model.path=some/model", worker="TellingWorker")
    executor.start(quiet)
    cores = len(os.sched_getaffinity(0))
    for rank, pid in enumerate(ranks()):
        facts = (tmp_path / "logs" / f"rank{rank}.log").read_text()
        assert f"'device_index': {rank}" in facts
        assert f"'omp': '{max(1, cores // 2)}'" in facts
        assert f"'model_path': '{tmp_path}/some/model'" in facts
        assert "'init_method': 'tcp://127.0.0.1:1'" in facts
        assert os.getsid(pid) == pid
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert command[1:] == [b"-m", b"cluster.rank_process", b""]


def test_start_from_a_thread(make: Make) -> None:
    """The ranks must outlive the thread that started them."""
    executor = make()
    thread = threading.Thread(target=executor.start, args=(quiet,))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert executor.execute(plan(1)).step_id == 1


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.helpers.cluster_faces import config, plan
from cluster.local_executor import LocalExecutor

executor = LocalExecutor(config("cluster.log_dir={logs}"), worker_class={worker!r}, store_module={store!r})
try:
    executor.start(lambda line: None)
    executor.execute(plan(1))
    print("ready", flush=True)
    time.sleep(60)
finally:
    executor.shutdown()
    print("down", flush=True)
"""


@pytest.fixture
def engine(repo_root: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An engine process of its own, started in a folder that knows nothing of the repository."""
    text = SCRIPT.format(
        root=str(repo_root), worker=f"{FAKE}FakeWorker", store=STORE, logs=tmp_path / "logs"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with engine_process(text, tmp_path, env) as process:
        yield process


def test_start_elsewhere_and_ctrl_c(engine: subprocess.Popen[str]) -> None:
    assert read_line(engine) == "ready"
    processes = descendants(engine.pid)
    assert len(processes) == 2
    os.killpg(engine.pid, signal.SIGINT)
    begin = time.monotonic()
    assert read_line(engine) == "down"
    assert time.monotonic() - begin < 5
    engine.wait(5)
    assert not wait_gone(processes, 1)


def test_ranks_end_with_a_killed_engine(engine: subprocess.Popen[str]) -> None:
    assert read_line(engine) == "ready"
    processes = descendants(engine.pid)
    stopped = max(processes)
    os.kill(stopped, signal.SIGSTOP)  # even one that cannot watch its parent
    engine.kill()
    engine.wait()
    assert not wait_gone(processes, 3)


def test_start_message_over_a_pipe() -> None:
    start = RankStart(
        config=config().worker(),
        rank=1,
        device_index=1,
        key=bytes(32),
        engine="tcp://127.0.0.1:1",
        store_host="127.0.0.1",
        env={"A": "b"},
        start_deadline_s=1.0,
        max_message_bytes=1 << 20,
        failpoints=config("cluster.failpoints=[{kind: hang, rank: 0, step: 1}]").cluster.failpoints,
    )
    reading, writing = os.pipe()
    with open(writing, "wb") as stream:
        write_start(stream, start)
        stream.write(b"rest")
    try:
        assert read_start(reading) == start
        assert os.read(reading, 10) == b"rest"
        with pytest.raises(EOFError):
            read_start(reading)
    finally:
        os.close(reading)


@pytest.mark.parametrize("name", ["local", "ray"])
def test_make_executor(name: str) -> None:
    executor = make_executor(_with_executor(name))
    assert type(executor).__name__ == f"{name.capitalize()}Executor"
    executor.shutdown()  # before a start it has nothing to do


def _with_executor(name: str) -> ClusterConfig:
    return config(f"cluster.executor={name}")
