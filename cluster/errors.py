"""What can go wrong in the control plane, by who has to react to it."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that is refused; it concerns its sender alone and the engine goes on."""


class CapacityError(RuntimeError):
    """More blocks, slots or bytes were asked for than there are."""


class WorkerFailure(RuntimeError):
    """A rank died, hung or answered nonsense; the whole gang must be rebuilt.

    ``rank`` is -1 and ``step_id`` is -1 when they are not known (during start-up, for example).
    """

    def __init__(self, rank: int, phase: str, step_id: int, detail: str) -> None:
        self.rank = rank
        self.phase = phase
        self.step_id = step_id
        self.detail = detail
        who = f"rank {rank}" if rank >= 0 else "a rank"
        where = f" of step {step_id}" if step_id >= 0 else ""
        super().__init__(f"{who} failed in {phase}{where}: {detail}")


class EngineDead(RuntimeError):
    """The ranks failed more often than ``cluster.max_rebuilds`` allows; nothing is served any more."""


class ConfigError(ValueError):
    """A config file, a ``--set`` or a combination of keys that cannot be used (exit 2)."""
