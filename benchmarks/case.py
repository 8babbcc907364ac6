"""What a benchmark case is, and how its time is taken.

Every ``benchmarks/*_cases.py`` has a function ``cases() -> Iterable[Case]``. Walking it makes nothing
on the device (a CPU can list all cases); ``Case.make`` builds inputs and returns what to time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import dispatch

# What one H200 can do, measured: matrix products in bf16, taken as twice that in fp8, device copies.
BF16_TFLOPS, FP8_TFLOPS, COPY_TBPS = 790.0, 1580.0, 4.27
DEEP_GEMM, FLASH_MLA = "sgl-deep-gemm 0.1.4.post1", "FlashMLA (sglang-kernel 0.4.5)"
ROTATE_BYTES = 256 << 20  # more than the L2 holds, several times
_MAX_SETS = 64
_MIN_CALLS = 16  # of a graph
_TURNS, _MOST_TURNS = 8, 24  # measured, after one that warms up
_TURNS_US = 15_000.0  # that these may take: more of them, and the chip meets its power limit

Call = Callable[[], object]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What to time; the inputs are made.

    Args:
        calls: the op on different sets of inputs, so that none is found in L2 where a cold read is
            meant.
        library: the same work by the library of ``Case.library``; empty where it is not installed.
        library_in_graph: whether the library's call can be captured; else it is timed between events.
        backends: name of an optional backend's implementation -> the op through it.
    """

    calls: Sequence[Call]
    library: Sequence[Call] = ()
    library_in_graph: bool = True
    backends: dict[str, Sequence[Call]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one shape.

    Args:
        op: its name in ``kernels.implementations``.
        shape: sizes in words.
        make: builds the inputs on the current device.
        flops: operations of one call; 0: it is judged by bytes alone.
        moved: the fewest bytes one call can move: inputs read once, outputs written once.
        peak: TFLOP/s that the device has for these operations.
        library: what ``Timed.library`` is, in words.
    """

    op: str
    shape: str
    make: Callable[[], Timed]
    flops: float = 0.0
    moved: float = 0.0
    peak: float = BF16_TFLOPS
    library: str | None = None

    @property
    def limit_us(self) -> float:
        """The time that operations or bytes alone would take."""
        return max(self.flops / self.peak, self.moved / COPY_TBPS) / 1e6


def own(op: str) -> Callable[..., Any]:
    """This project's implementation of ``op`` for the current device, whatever backend is installed."""
    return dispatch.own_kernel(op, torch.device("cuda", torch.cuda.current_device()))


def implementation(op: str) -> str:
    """Its name."""
    return dispatch.own(op, torch.device("cuda", torch.cuda.current_device())).name


def against_twin(op: str, *args: Any, **kwargs: Any) -> tuple[Call, Call]:
    """A call of the own kernel, and the same of the torch twin."""
    return partial(own(op), *args, **kwargs), partial(dispatch.twin(op), *args, **kwargs)


def alone(op: str, *args: Any, **kwargs: Any) -> tuple[Call, None]:
    """A call of the own kernel; the twin's time is of no interest."""
    return partial(own(op), *args, **kwargs), None


def row_case(
    op: str,
    shape: str,
    make: Callable[[], tuple[Call, Call | None]],
    *,
    moved: float,
    held: float | None = None,
) -> Case:
    """An op that moves rows.

    Args:
        op: its name.
        shape: sizes in words.
        make: builds one set of inputs and returns the call and the torch twin's, which is timed too at
            16,384 rows.
        moved: bytes of one call.
        held: bytes of one set of inputs; None: as many as move.
    """

    def timed() -> Timed:
        made = sets(held or moved, make)
        twin = made[0][1] if shape.startswith("16384x") else None
        return Timed(
            calls=[call for call, _ in made],
            library=() if twin is None else [twin],
            library_in_graph=False,
        )

    return Case(op=op, shape=shape, make=timed, moved=moved, library="torch eager")


def sets(held: float, make: Callable[[], Made]) -> list[Made]:
    """As many sets of inputs as leave L2 (``held``: bytes of one)."""
    count = max(1, min(_MAX_SETS, int(ROTATE_BYTES // max(held, 1))))
    return [make() for _ in range(count)]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values on the device."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def integers(high: int, *shape: int) -> Tensor:
    """Evenly drawn int64 values below ``high`` on the device."""
    return torch.randint(0, high, shape, device="cuda")


def graph_us(variants: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """Median microseconds of one call of each variant, its calls replayed as one graph.

    Variants take turns, every other turn in the opposite order, so that the clocks, which move with the
    chip's temperature and power, are the same for all. Short graphs take more turns.
    """
    graphs = {name: _captured(calls) for name, calls in variants.items()}
    warm = sum(_between_events(graph.replay) for graph, _ in graphs.values())
    turns = max(_TURNS, min(_MOST_TURNS, int(_TURNS_US / warm)))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(turns):
        for name, (graph, count) in sorted(graphs.items(), reverse=bool(turn % 2)):
            times[name].append(_between_events(graph.replay) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of all calls, often enough to hide its own start, and how many calls that are."""
    for call in calls:
        call()
    rounds = max(1, -(-_MIN_CALLS // len(calls))) if _between_events(calls[0]) < 1000.0 else 1
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph, rounds * len(calls)


def eager_us(calls: Sequence[Call]) -> float:
    """Median microseconds of one call between two events, host work included."""
    calls[0]()
    return statistics.median(_between_events(calls[i % len(calls)]) for i in range(_TURNS))


def _between_events(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop) * 1e3)
