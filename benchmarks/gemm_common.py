"""What the benchmarks of FP8 products share: rows of results, timing, weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import quant_fp8_weight
from kernels.linear.api import WeightKind
from kernels.linear.device_weight import Fp8Weight

FP8_TFLOPS = 1580.0  # limit taken for an H200, see docs
COPY_TBPS = 4.27
ROTATE_BYTES = 400 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure, as benchmarks/results/*.json keeps it."""

    op: str
    shape: str
    implementation: str
    us: float
    tflops: float | None
    tbps: float | None
    share_of_limit: float
    library: str | None
    library_us: float | None
    hardware: str
    date: str


def graph_us(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds of one call, all of them replayed as one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(times[1:])


def make_weight(n: int, k: int) -> Fp8Weight:
    """A random weight in checkpoint format."""
    data, scale = quant_fp8_weight(torch.randn(n, k, device="cuda") * 0.02)
    return Fp8Weight(data=data, scale=scale, kind=WeightKind.FP8)
