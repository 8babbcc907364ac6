"""What ranks agree on before they allocate and capture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.parallel.config import MeshCoord
from worker.config import ModelSource, WorkerConfig
from worker.worker import Worker


class World:
    """A group of two; the other rank brings a number of its own to every maximum."""

    def __init__(self, other: float) -> None:
        self.other = other

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        assert op == "max"
        return x.clamp_(min=self.other)


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_experts_without_a_stack_on_one_rank_keep_all_from_graphs(here: bool, there: bool) -> None:
    """A rank that captures rehearses other steps than one that does not: each would wait for the other."""
    config = WorkerConfig(model=ModelSource(path="", numerics="release"), device="cpu")
    worker: Any = Worker(config, MeshCoord(cp=0, tp=0, rank=0))
    worker._mesh = SimpleNamespace(world=World(float(there)))
    blocks = [SimpleNamespace(ffn=SimpleNamespace(walks_experts=walks)) for walks in (False, here)]
    worker._model = SimpleNamespace(blocks=blocks)
    assert worker._any_rank_walks_experts() == (here or there)
