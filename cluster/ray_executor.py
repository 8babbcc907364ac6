"""``cluster.executor: ray``: one Ray actor per rank, on this machine or on several.

Ray places, watches and ends the processes. It does not notice a stopped one, so ranks of this machine
are also killed by their process id, and silence is noticed by the gang's heartbeat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.errors import WorkerFailure
from cluster.executor import Report
from cluster.gang_executor import GangExecutor
from cluster.launcher import Placement
from cluster.process_state import log_tail, process_gone, process_stopped
from cluster.rank_env import import_path, rank_env
from cluster.rank_start import STORE_MODULE, WORKER_CLASS, RankStart, encode_start
from cluster.ray_runtime import RayRuntime
from cluster.worker_actor import ActorPlace, RankActor

_LOG = logging.getLogger("causeway.ray")
_LOOPBACK = "127.0.0.1"
_LOOK_EVERY_S = 0.15  # asking Ray costs more than asking the kernel
_KILL_LOCAL_S = 2.0
_KILL_REMOTE_S = 8.0  # Ray itself ends a stopped actor after 5 s


class RayLauncher:
    """Places the ranks by a placement group: one bundle per machine, ranks of a machine in a row."""

    notice_s = 0.7

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._world = config.parallel.world
        self._runtime = RayRuntime(
            config.cluster.ray, cpus=self._world, cpu_only=config.device == "cpu"
        )
        self._group: Any = None
        self._actors: list[Any] = []
        self._places: list[ActorPlace] = []
        self._runs: list[Any] = []
        self._known_ends: dict[int, str] = {}
        self._next_look = 0.0

    def place(self, report: Report) -> Placement:
        """Start or join Ray, reserve the machines, start the actors.

        Raises:
            WorkerFailure: Ray has no room for the ranks, or an actor does not start.
        """
        begin = time.monotonic()
        address = self._runtime.ensure()
        report(f"Ray at {address}  {time.monotonic() - begin:.1f} s")
        deadline = begin + self._config.cluster.start_deadline_s
        gpus = self._needs_gpus()
        per_node = self._world // self._config.cluster.nodes
        if self._config.device == "auto":
            report(f"device auto: {'cuda' if gpus else 'cpu'} (Ray has {self._gpus()} GPU(s))")
        if self._group is None:
            self._group = self._reserve(per_node, gpus, deadline, report)
        self._start_actors(per_node, gpus, deadline)
        machines = list(dict.fromkeys(place.node_ip for place in self._places))
        report(
            f"{self._world} actor(s) on {len(machines)} machine(s)  {time.monotonic() - begin:.1f} s"
        )
        here = self._runtime.node_id()
        one_machine = all(place.node_id == here for place in self._places)
        return Placement(
            engine_host=_LOOPBACK if one_machine else self._runtime.node_ip(),
            store_host=_LOOPBACK if one_machine else self._places[0].node_ip,
            device="cuda" if gpus else "cpu",
            devices=tuple(max(0, place.device_index) for place in self._places),
            env=rank_env(os.environ, ranks_per_node=per_node, one_machine=one_machine),
        )

    def launch(self, starts: Sequence[RankStart]) -> None:
        """Call ``run`` on every actor; the calls return when the ranks end."""
        self._known_ends = {}
        self._runs = [
            actor.run.remote(encode_start(start))
            for actor, start in zip(self._actors, starts, strict=True)
        ]

    def ended(self) -> dict[int, str]:
        """Rank -> how it ended, as Ray tells it."""
        now = time.monotonic()
        if self._runs and now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            finished, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
            for ref in finished:
                rank = self._runs.index(ref)
                if rank not in self._known_ends:
                    self._known_ends[rank] = _how(ref)
        return dict(self._known_ends)

    def evidence(self, rank: int) -> str:
        """Whether a process of this machine is stopped; the last output of one that died."""
        if rank >= len(self._places) or self._places[rank].node_id != self._runtime.node_id():
            return ""
        pid = self._places[rank].pid
        if rank not in self._known_ends:
            return "its process is stopped" if process_stopped(pid) else ""
        tail = log_tail(self._runtime.error_log(pid))
        return f"last output: {tail}" if tail else ""

    def kill(self) -> None:
        """Kill the actors through Ray, and those of this machine by process id as well."""
        here = self._runtime.node_id() if self._places else ""
        local: list[int] = []
        for rank, actor in enumerate(self._actors):
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
            if rank < len(self._places) and self._places[rank].node_id == here:
                local.append(self._places[rank].pid)
                if rank not in self._known_ends:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(self._places[rank].pid, signal.SIGKILL)
        self._wait_until_gone(local)
        self._actors, self._places, self._runs, self._known_ends = [], [], [], {}

    def close(self) -> None:
        """Kill the ranks, give the machines back, end the Ray that we started."""
        try:
            if ray.is_initialized():
                self.kill()
                if self._group is not None:
                    with contextlib.suppress(RayError):
                        remove_placement_group(self._group)
        finally:
            self._group = None
            self._runtime.stop()

    def _needs_gpus(self) -> bool:
        """Whether every rank gets a GPU; ``auto`` takes them when Ray has enough."""
        have = self._gpus()
        if self._config.device == "cuda" and have < self._world:
            text = f"device cuda needs {self._world} GPUs, Ray has {have}"
            raise WorkerFailure(-1, "placement", -1, text)
        return self._config.device == "cuda" or (
            self._config.device == "auto" and have >= self._world
        )

    def _gpus(self) -> int:
        return int(self._runtime.total("GPU"))

    def _reserve(self, per_node: int, gpus: bool, deadline: float, report: Report) -> Any:
        bundle = {"CPU": float(per_node)} | ({"GPU": float(per_node)} if gpus else {})
        nodes = self._config.cluster.nodes
        group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
        said = False
        while not group.wait(max(0.5, min(5.0, deadline - time.monotonic()))):
            if not said:
                said = True
                report(f"waiting for {nodes} machine(s) with {bundle}; free: {self._free()}")
            if time.monotonic() > deadline:
                remove_placement_group(group)
                text = f"Ray has no room for {nodes} x {bundle}; free: {self._free()}"
                raise WorkerFailure(-1, "placement", -1, text)
        return group

    def _free(self) -> str:
        return ", ".join(f"{name} {self._runtime.free(name):g}" for name in ("CPU", "GPU"))

    def _start_actors(self, per_node: int, gpus: bool, deadline: float) -> None:
        env = {"PYTHONPATH": import_path(os.environ)}
        if gpus:
            env["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = (
                "1"  # peers map each other's memory
            )
        actors = [
            RankActor.options(  # type: ignore[attr-defined]
                num_gpus=1 if gpus else 0,
                runtime_env={"env_vars": env},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=slot // per_node
                ),
            ).remote()
            for slot in range(self._world)
        ]
        self._actors = actors
        asked = [actor.place.remote() for actor in actors]
        try:
            answers = ray.get(asked, timeout=max(1.0, deadline - time.monotonic()))
        except GetTimeoutError as error:
            text = "an actor did not start within cluster.start_deadline_s"
            raise WorkerFailure(-1, "placement", -1, text) from error
        except RayError as error:
            raise WorkerFailure(-1, "placement", -1, _first_lines(error)) from error
        places = [msgspec.msgpack.decode(answer, type=ActorPlace) for answer in answers]
        # Within a machine ranks follow the device index; machines keep the order of their bundles.
        order = sorted(range(self._world), key=lambda i: (i // per_node, places[i].device_index, i))
        self._actors = [actors[i] for i in order]
        self._places = [places[i] for i in order]

    def _wait_until_gone(self, local: list[int]) -> None:
        until = time.monotonic() + _KILL_LOCAL_S
        while not all(process_gone(pid) for pid in local) and time.monotonic() < until:
            time.sleep(0.02)
        if len(local) < len(self._places) and self._runs:
            ray.wait(self._runs, num_returns=len(self._runs), timeout=_KILL_REMOTE_S)


class RayExecutor(GangExecutor):
    """Runs the ranks as Ray actors; the default."""

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
            RayLauncher(config),
            load_mtp=load_mtp,
            worker_class=worker_class,
            store_module=store_module,
        )


def _how(ref: Any) -> str:
    """How a run ended."""
    try:
        code = ray.get(ref, timeout=1)
    except RayError as error:
        return f"its process died, says Ray: {_first_lines(error)}"
    return f"left with exit code {code}"


def _first_lines(error: BaseException) -> str:
    """What Ray has to say, without its lists of ids, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_RAY_NOISE)]
    text, _, _ = " ".join(said).partition("Some common causes")
    return text.strip()[:_MAX_REASON] or type(error).__name__


_MAX_REASON = 500  # characters of Ray's own explanation
_RAY_NOISE = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:", "repr_name:")
