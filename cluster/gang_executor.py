"""The executor both launchers share: builds a gang, rebuilds it after a failure, ends it."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace

from cluster.config import ClusterConfig
from cluster.executor import Report
from cluster.gang import Gang
from cluster.launcher import Launcher
from cluster.rank_start import STORE_MODULE, WORKER_CLASS, RankStart
from cluster.transport import EngineEndpoint
from worker.config import ModelSource
from worker.protocol import CacheInfo, StepOutput, StepPlan
from worker.wire import KEY_BYTES


class GangExecutor:
    """``cluster.executor.Executor`` over a launcher; used by one thread."""

    def __init__(
        self,
        config: ClusterConfig,
        launcher: Launcher,
        *,
        load_mtp: bool = False,
        worker_class: str = WORKER_CLASS,
        store_module: str = STORE_MODULE,
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._load_mtp = load_mtp
        self._worker_class = worker_class
        self._store_module = store_module
        self._gang: Gang | None = None
        self._generation = 0

    def start(self, report: Report) -> CacheInfo:
        """Start all ranks and load the model; what they allocated.

        Raises:
            WorkerFailure: a rank was lost; nothing of the start is left.
        """
        try:
            return self._build(report)
        except BaseException:
            self.shutdown()
            raise

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step everywhere; rank 0's output.

        Raises:
            WorkerFailure: a rank was lost; all ranks are ended, ``restart`` may follow.
        """
        return self._running().execute(plan)

    def check(self) -> None:
        """Look whether every rank lives, between steps.

        Raises:
            WorkerFailure: one does not.
        """
        self._running().check()

    def restart(self, report: Report) -> CacheInfo:
        """End what is left of the ranks and start them anew; how often is the engine's decision.

        Raises:
            WorkerFailure: a rank was lost during the start; ``restart`` may follow.
        """
        self._generation += 1
        return self._build(report)

    def shutdown(self) -> None:
        """End every rank and what the launcher started; safe to call twice, and after a failure."""
        gang, self._gang = self._gang, None
        try:
            if gang is not None:
                gang.stop()
        finally:
            self._launcher.close()

    def _build(self, report: Report) -> CacheInfo:
        if self._gang is not None:
            self._gang.stop()
        config, limits = self._config, self._config.cluster
        placement = self._launcher.place(report)
        worker = replace(
            config.worker(load_mtp=self._load_mtp),
            device=placement.device,
            model=_absolute(config.model),
        )
        key = secrets.token_bytes(KEY_BYTES)
        endpoint = EngineEndpoint(placement.engine_host, key, limits.max_message_bytes)
        gang = Gang(self._launcher, endpoint, limits, config.parallel.world)
        self._gang = gang
        starts = [
            RankStart(
                config=worker,
                rank=rank,
                device_index=placement.devices[rank],
                key=key,
                engine=endpoint.address,
                store_host=placement.store_host,
                env=placement.env,
                start_deadline_s=limits.start_deadline_s,
                max_message_bytes=limits.max_message_bytes,
                generation=self._generation,
                failpoints=limits.failpoints,
                worker_class=self._worker_class,
                store_module=self._store_module,
            )
            for rank in range(config.parallel.world)
        ]
        return gang.start(starts, report)

    def _running(self) -> Gang:
        if self._gang is None:
            raise RuntimeError("the executor has not been started")
        return self._gang


def _absolute(model: ModelSource) -> ModelSource:
    """Paths as the ranks see them: an actor need not run in our working directory."""
    path = os.path.abspath(model.path) if model.path else ""
    shape = os.path.abspath(model.shape) if os.path.isfile(model.shape) else model.shape
    return replace(model, path=path, shape=shape)
