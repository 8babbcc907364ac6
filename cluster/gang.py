"""All ranks of one world, from their start to the first failure: one lost rank ends them all.

Used by one thread. Whatever waits, waits in ``_pump``, which takes messages, pings, and asks the
launcher whether a process has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from cluster.config import ClusterSection
from cluster.errors import WorkerFailure
from cluster.executor import Report
from cluster.health import Heartbeat, collect_stacks
from cluster.launcher import Launcher
from cluster.rank_start import RankStart
from cluster.transport import EngineEndpoint, PeerGone
from worker.protocol import CacheInfo, StepOutput, StepPlan
from worker.wire import (
    Channel,
    Done,
    Failed,
    Join,
    Pong,
    Progress,
    Ready,
    Shutdown,
    Step,
    StoreReady,
    ToEngine,
    WireError,
    encode,
)

_LOG = logging.getLogger("causeway.gang")
_POLL_S = 0.05
_LEAVE_S = 2.0  # how long they may take to leave by themselves
_STARTUP_SILENCE_S = 120.0  # a cold import of torch keeps the answering thread from running
_SUSPENDED_S = 3.0  # a longer pause between two looks means that we were stopped ourselves
_PER_RANK_FIELDS = ("allocated_bytes", "weight_bytes")


class Gang:
    """One life of a world."""

    def __init__(
        self, launcher: Launcher, endpoint: EngineEndpoint, limits: ClusterSection, world: int
    ) -> None:
        self.failure: WorkerFailure | None = None
        self._launcher = launcher
        self._endpoint = endpoint
        self._limits = limits
        self._ranks = range(world)
        self._phase = ["start"] * world  # of every rank
        self._step: StepPlan | None = None
        self._init_method = ""
        self._ready: dict[int, CacheInfo] = {}
        self._done: dict[int, StepOutput] = {}
        self._report: Report | None = None
        self._heartbeat = Heartbeat(endpoint, world, limits.heartbeat_s)
        self._next_look = self._last_pump = self._deadline = 0.0
        self._closed = False

    def start(self, starts: Sequence[RankStart], report: Report) -> CacheInfo:
        """Start every rank and wait until all are ready; gives what they allocated.

        Raises:
            WorkerFailure: a rank died, raised, fell silent, or the start deadline passed.
        """
        self._report = report
        self._begin_wait(self._limits.start_deadline_s)
        self._launcher.launch(starts)
        joined = False
        while len(self._ready) < len(self._ranks):
            self._pump()
            if not joined and self._init_method and self._all_known():
                joined = True
                for rank in self._ranks:
                    self._send(rank, encode(Join(init_method=self._init_method)))
            if time.monotonic() > self._deadline:
                late = [rank for rank in self._ranks if rank not in self._ready]
                raise self._hung(late, f"cluster.start_deadline_s {self._limits.start_deadline_s}")
        self._report = None
        for rank in self._ranks:
            self._phase[rank] = "idle"
        return self._agreed_info()

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step on every rank; rank 0's output.

        Raises:
            WorkerFailure: the first rank that died, raised, fell silent or passed the deadline.
        """
        if self.failure is not None:
            raise self.failure
        tokens = sum(len(piece.token_ids) for piece in plan.prefill)
        limit = self._limits.deadline_s(tokens)
        self._step = plan
        self._done = {}
        self._begin_wait(limit)
        payload = encode(Step(plan=plan))
        for rank in self._ranks:
            self._send(rank, payload)
        while len(self._done) < len(self._ranks):
            self._pump()
            if time.monotonic() > self._deadline:
                late = [rank for rank in self._ranks if rank not in self._done]
                raise self._hung(late, f"the step deadline of {limit:.3g} s")
        self._step = None
        return self._done[0]

    def check(self) -> None:
        """Look whether every rank still lives; for idle times.

        Raises:
            WorkerFailure: one does not.
        """
        if self.failure is not None:
            raise self.failure
        self._look()

    def stop(self) -> None:
        """End every rank, politely when none has failed; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self.failure is None and self._step is None and self._ready:
            self._ask_to_leave()
        self._launcher.kill()
        self._endpoint.close()

    def _ask_to_leave(self) -> None:
        payload = encode(Shutdown())
        try:
            for rank in self._ranks:
                self._endpoint.send(rank, Channel.DATA, payload)
        except PeerGone:
            return
        until = time.monotonic() + _LEAVE_S
        while time.monotonic() < until and len(self._launcher.ended()) < len(self._ranks):
            self._endpoint.receive(_POLL_S)

    def _begin_wait(self, limit_s: float) -> None:
        now = time.monotonic()
        self._deadline = now + limit_s
        self._last_pump = now
        self._next_look = now + _POLL_S
        self._heartbeat.reset()  # while idle nobody read the answers

    def _pump(self) -> None:
        """Take the next message, or wait a moment; raise when a rank is lost."""
        received = self._endpoint.receive(_POLL_S)
        if received is not None:
            self._take(received[0], received[2])
        now = time.monotonic()
        if now - self._last_pump > _SUSPENDED_S:
            self._deadline += now - self._last_pump
            self._heartbeat.reset()
        self._last_pump = now
        if now >= self._next_look:
            self._next_look = now + _POLL_S
            self._look()
        allowed = self._limits.heartbeat_timeout_s
        if self._report is not None:
            allowed = max(allowed, _STARTUP_SILENCE_S)
        silent = self._heartbeat.tick(now, allowed)
        if silent is not None:
            raise self._hung([silent], f"the heartbeat timeout of {allowed:g} s")

    def _take(self, rank: int, message: ToEngine) -> None:
        match message:
            case Progress():
                self._phase[rank] = message.phase
                if self._report is not None and message.fraction > 0:
                    self._report(progress_line(message))
            case StoreReady():
                self._init_method = message.init_method
            case Ready():
                self._ready[rank] = message.info
            case Done(output=output):
                if self._step is None or output.step_id != self._step.step_id:
                    text = f"answered step {output.step_id} unasked"
                    raise self._lost(rank, text)
                self._done[rank] = output
            case Pong():
                self._heartbeat.answered(rank)
            case Failed():
                raise self._raised(message)

    def _look(self) -> None:
        for rank, how in self._launcher.ended().items():
            self._drain()  # its last words, if it had any
            raise self._lost(rank, how)

    def _drain(self) -> None:
        while (received := self._endpoint.receive(0)) is not None:
            if isinstance(received[2], Failed):
                raise self._raised(received[2])

    def _send(self, rank: int, payload: bytes) -> None:
        try:
            self._endpoint.send(rank, Channel.DATA, payload)
        except PeerGone as error:
            # Its socket went before its exit status came: the status says more.
            dead = self._wait_for_an_end()
            lost = min(dead, default=rank)
            raise self._lost(lost, dead.get(lost, str(error))) from error
        except WireError as error:
            raise self._lost(rank, str(error)) from error

    def _all_known(self) -> bool:
        return all(self._endpoint.known(rank, Channel.DATA) for rank in self._ranks)

    def _agreed_info(self) -> CacheInfo:
        """Rank 0's report, after a look whether the others allocated the same."""
        first = msgspec.structs.asdict(self._ready[0])
        for rank, info in self._ready.items():
            mine = msgspec.structs.asdict(info)
            for name, value in first.items():
                if name not in _PER_RANK_FIELDS and mine[name] != value:
                    text = f"allocated {name} {mine[name]}, rank 0 {value}"
                    raise self._lost(rank, text)
        return self._ready[0]

    def _raised(self, message: Failed) -> WorkerFailure:
        """A rank's exception, unless it only felt the death of another."""
        dead = self._wait_for_an_end()
        if dead:
            rank = min(dead)
            return self._lost(rank, dead[rank])
        detail = message.detail
        if message.traceback:
            _LOG.error("rank %d:\n%s", message.rank, message.traceback)
        return self._end(message.rank, message.phase, message.step_id, detail)

    def _wait_for_an_end(self) -> dict[int, str]:
        until = time.monotonic() + self._launcher.notice_s
        while not (dead := self._launcher.ended()) and time.monotonic() < until:
            time.sleep(0.02)
        return dead

    def _hung(self, late: list[int], limit: str) -> WorkerFailure:
        """Some ranks did not answer in time: dump all stacks, name the one the others wait for."""
        stacks = collect_stacks(self._endpoint, len(self._ranks))
        silent = [rank for rank in late if rank not in stacks]
        outside = [rank for rank in late if "torch/distributed" not in stacks.get(rank, "")]
        rank = (silent or outside or late)[0]
        others = "" if len(late) == 1 else f"; ranks {late} did not finish"
        return self._lost(rank, f"hung: no answer within {limit}{others}")

    def _lost(self, rank: int, detail: str) -> WorkerFailure:
        phase, step_id = self._phase[rank], -1
        if self._step is not None and rank not in self._done:
            phase, step_id = self._step.phase, self._step.step_id
        evidence = self._launcher.evidence(rank)
        return self._end(rank, phase, step_id, f"{detail} ({evidence})" if evidence else detail)

    def _end(self, rank: int, phase: str, step_id: int, detail: str) -> WorkerFailure:
        self._launcher.kill()
        self.failure = WorkerFailure(rank, phase, step_id, detail)
        return self.failure


def progress_line(message: Progress) -> str:
    """One line of start-up news: rank, phase, share, seconds."""
    share = "" if message.fraction >= 1 else f" {message.fraction:4.0%}"
    return f"rank {message.rank}  {message.phase:<8}{share:>6} {message.seconds:7.1f} s"
