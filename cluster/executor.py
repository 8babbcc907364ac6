"""What the engine asks of whoever runs the ranks: ``local`` processes, Ray actors, or a test's mock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from worker.protocol import CacheInfo, StepOutput, StepPlan

Report = Callable[[str], None]
"""Takes one line about start-up progress (rank, phase, seconds); never raises."""


class Executor(Protocol):
    """Runs steps on every rank of one world. Used by one thread; calls block.

    Every failure of a rank (dead, hung past its deadline, refused a step) is a ``WorkerFailure``.
    After one, only ``restart`` and ``shutdown`` may be called.
    """

    def start(self, report: Report) -> CacheInfo:
        """Start all ranks and load the model; what they allocated (equal on every rank)."""
        ...

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step everywhere and give rank 0's output, with ``plan``'s step_id."""
        ...

    def restart(self, report: Report) -> CacheInfo:
        """End what is left of the ranks and start them anew: empty caches, slots and tails."""
        ...

    def shutdown(self) -> None:
        """End every rank; safe to call twice, and after a failure."""
        ...
