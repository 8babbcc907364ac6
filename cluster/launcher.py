"""What a gang asks of whoever starts the processes of the ranks: this machine, or Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.executor import Report
from cluster.rank_start import RankStart


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the launcher put the ranks."""

    engine_host: str  # address of this machine on which the ranks can reach us
    store_host: str  # address of rank 0's machine on which the others can reach it
    device: Literal["auto", "cpu", "cuda"]  # what the ranks compute on
    devices: tuple[int, ...]  # of every rank: CUDA device, counted within those its process sees
    env: dict[str, str]  # for every rank, see rank_env


class Launcher(Protocol):
    """Starts and ends the processes of the ranks; used by one thread."""

    notice_s: float
    """Seconds after which a process that ended certainly shows up in ``ended``."""

    def place(self, report: Report) -> Placement:
        """Find a place for every rank; may start Ray."""
        ...

    def launch(self, starts: Sequence[RankStart]) -> None:
        """Start one process per rank, in rank order."""
        ...

    def ended(self) -> dict[int, str]:
        """Rank -> how it ended, of those that did; nothing after ``kill``."""
        ...

    def evidence(self, rank: int) -> str:
        """What else is known of a lost rank (stopped process, last output); empty when nothing."""
        ...

    def kill(self) -> None:
        """End every rank by force and wait until they are gone."""
        ...

    def close(self) -> None:
        """Kill, and give back everything, Ray included; ``place`` may follow."""
        ...
