"""Work beside the caller's: what the join hands over, and on a GPU what waits for what."""

from __future__ import annotations

import pytest
import torch

from kernels import beside
from tests.helpers.gpu import DEVICE


def test_work_runs_once_and_its_result_is_joined() -> None:
    calls: list[int] = []
    join = beside(torch.device("cpu"), lambda: calls.append(1) or len(calls))
    assert calls == [1]
    assert join() == 1
    assert calls == [1]


def test_an_error_of_the_work_is_the_callers() -> None:
    def work() -> None:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        beside(torch.device("cpu"), work)


def slow_then(x: torch.Tensor) -> torch.Tensor:
    """A long kernel chain, then ``x + 1``: who does not wait for it reads something else."""
    for _ in range(50):
        x = x @ torch.eye(x.shape[0], device=x.device)
    return x + 1


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_fork_and_join_wait_on_a_gpu(captured: bool) -> None:
    source = torch.zeros(1024, 1024, device=DEVICE)

    def step() -> torch.Tensor:
        x = slow_then(source)  # the work must wait for this
        join = beside(DEVICE, lambda: slow_then(x))
        y = slow_then(x)
        joined: torch.Tensor = join() * 2 + y  # and this for the work
        return joined

    torch.cuda.synchronize()
    if not captured:
        for value in (1.0, 5.0):
            source.fill_(value)
            assert torch.equal(step(), torch.full_like(source, 3 * (value + 2)))
        return
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for value in (1.0, 5.0):
        source.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full_like(source, 3 * (value + 2)))
