"""A stand-in for captured CUDA graphs on the CPU: replaying runs the recorded work again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class FakeGraph:
    """Work, and where its result goes."""

    work: Callable[[], Tensor]
    result: Tensor

    def replay(self) -> None:
        """Run the work on whatever its inputs hold now."""
        found = self.work()
        self.result.resize_(found.shape).copy_(found)


@dataclass(slots=True)
class FakeRecorder:
    """Counts what the real one would do."""

    dtype: torch.dtype = torch.float32  # of results
    captures: int = 0
    events: list[str] = field(default_factory=list)

    def capture(self, work: Callable[[], Tensor]) -> tuple[FakeGraph, Tensor]:
        """As ``worker.cuda_graph.GraphMemory.capture``."""
        self.captures += 1
        self.events.append("capture")
        result = torch.empty(0, dtype=self.dtype)  # a capture computes nothing
        return FakeGraph(work, result), result

    def settle(self) -> None:
        """Nothing runs on its own here."""
        self.events.append("settle")

    def reset(self) -> None:
        """There is no pool."""
        self.events.append("reset")
