"""Prefill steps as CUDA graphs: a shape that comes back is captured, later steps of it are replayed.

A prefill step is some four thousand launches, and its host may need longer than its kernels. Shapes
follow the prompts, so most come once: a step is launched as ever when its key (``worker.prefill_key``) is
new, which also builds whatever is built at first use; captured when the key is seen again; replayed from
then on, with the step's tensors copied into those that the capture read. Every rank sees the same keys in
the same order and keeps the same books, so all of them capture, replay and forget at the same step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from worker.batch_layout import layout_of, place_in

if TYPE_CHECKING:
    from model.forward_batch import PrefillBatch
    from model.parallel.config import ParallelConfig
    from worker.prefill_key import StepKey
    from worker.prefill_step import PrefillStep

Forward = Callable[["PrefillBatch"], Tensor]

_KEPT = 4  # graphs at once: each keeps its result and thousands of launches
# Prefill steps after which a graph may make room; a capture costs several launched steps.
_IDLE = 64
_SEEN = 256  # keys remembered that have no graph


class Graph(Protocol):
    """What a capture gave."""

    def replay(self) -> None:
        """Queue all of it on the current stream."""


class Recorder(Protocol):
    """Makes graphs (``worker.cuda_graph.GraphMemory``)."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Record what ``work`` queues, without running it; its result lies where replays write it."""

    def settle(self) -> None:
        """Wait until no graph runs, so that one may be dropped."""

    def reset(self) -> None:
        """Every graph is gone: so is the memory they shared."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a step, and whose graph goes first."""

    action: Literal["launch", "capture", "replay"]
    evicted: StepKey | None = None


class CaptureChoice:
    """Decides from the keys of the steps so far, and from nothing else.

    A graph makes room only after ``idle`` steps without it: more shapes in turn than there is room for
    must not lead to a capture each.
    """

    def __init__(self, *, kept: int = _KEPT, idle: int = _IDLE) -> None:
        self._kept, self._idle, self._step = kept, idle, 0
        self._used: dict[StepKey, int] = {}  # captured -> the last step that had it
        self._seen: OrderedDict[StepKey, None] = OrderedDict()

    def choose(self, key: StepKey) -> Choice:
        """The next step has this key."""
        self._step += 1
        if key in self._used:
            self._used[key] = self._step
            return Choice("replay")
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            return Choice("launch")
        evicted = None
        if len(self._used) >= self._kept:
            evicted = min(self._used, key=self._used.__getitem__)
            if self._step - self._used[evicted] <= self._idle:
                self._seen.move_to_end(key)
                return Choice("launch")
            del self._used[evicted]
        del self._seen[key]
        self._used[key] = self._step
        return Choice("capture", evicted)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    packed: Tensor  # the buffer that the graph reads
    layout: Hashable
    streams: Tensor


class PrefillGraphs:
    """Runs prefill steps, those of a shape that came before as graphs.

    Args:
        forward: batch -> streams [T, R, D]; must read nothing back from the device.
        recorder: makes the graphs.
        choice: decides which.
    """

    def __init__(
        self, forward: Forward, recorder: Recorder, choice: CaptureChoice | None = None
    ) -> None:
        self._forward, self._recorder = forward, recorder
        self._choice = CaptureChoice() if choice is None else choice
        self._captured: dict[StepKey, _Captured] = {}
        self.num_replays = 0  # steps that ran as a graph captured before

    def run(self, step: PrefillStep) -> Tensor:
        """Streams [T, R, D] of a step; the caller's to keep.

        After any exception the ranks must start anew: the step counts as done in the books (its key as
        captured, say), here and on ranks where nothing failed.

        Raises:
            RuntimeError: a step whose layout is not that of the step captured under its key; no memory
                for a graph, or for a step beside graphs.
        """
        choice = self._choice.choose(step.key)
        if choice.evicted is not None:
            self._recorder.settle()
            del self._captured[choice.evicted]
            if not self._captured:
                self._recorder.reset()
        if choice.action == "launch":
            with _ways_out() if self._captured else nullcontext():
                return self._forward(step.batch)
        if choice.action == "capture":
            with _ways_out():
                self._captured[step.key] = self._capture(step)
        else:
            self._load(self._captured[step.key], step)
            self.num_replays += 1
        captured = self._captured[step.key]
        with _ways_out():
            captured.graph.replay()
            return captured.streams.clone()  # the next graph works in the same memory

    def close(self) -> None:
        """Destroy the graphs: NCCL gives up no communicator that one of them still names."""
        if self._captured:
            self._recorder.settle()
            self._captured.clear()
            self._recorder.reset()

    def _capture(self, step: PrefillStep) -> _Captured:
        # The key was launched before: nothing is compiled, allocated for good or connected from here on.
        # No warm-up: a prefill step run twice would read ring rows that its first run has overwritten.
        packed = step.packed.clone()
        static = place_in(packed, step.batch)
        graph, streams = self._recorder.capture(lambda: self._forward(static))
        return _Captured(graph, packed, layout_of(static), streams)

    @staticmethod
    def _load(captured: _Captured, step: PrefillStep) -> None:
        # A rank that launched the step instead would leave the others waiting in their graphs.
        if layout_of(step.batch) != captured.layout:
            raise RuntimeError(
                f"a prefill step of {step.batch.num_rows} rows has the key of another layout:"
                " worker.prefill_key.step_key lacks something"
            )
        captured.packed.copy_(step.packed)


@contextmanager
def _ways_out() -> Iterator[None]:
    """Where graphs hold memory, its lack becomes an error that names what can be done."""
    try:
        yield
    except RuntimeError as error:
        # The end of a capture may fail in turn.
        if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
            raise
        raise RuntimeError(
            "no GPU memory for prefill steps as CUDA graphs, which keep the workspace of the largest"
            " captured step: set prefill_graphs: false, or lower kv_cache.memory_fraction"
        ) from error


def prefill_obstacle(
    parallel: ParallelConfig, *, decode_obstacle: str, waits_for_host: bool
) -> str:
    """Why prefill steps cannot be captured; empty when they can.

    Args:
        decode_obstacle: of ``worker.cuda_graph.graph_obstacle``.
        waits_for_host: the experts of some layer read back how many rows travel.
    """
    if decode_obstacle:
        return decode_obstacle
    if parallel.kv_shard == "cp" and parallel.cp > 1:
        return "with parallel.kv_shard cp the blocks' owners decide how many pages travel"
    if waits_for_host:
        return "the experts' ranks read back how many rows travel (moe_combine ordered, many ranks)"
    return ""
