"""Decode steps as CUDA graphs: captured once per padded shape, replayed with the next step's metadata.
``GraphMemory`` also serves prefill steps (``worker.prefill_graph``).

A decode step is a thousand small kernels; started one by one they would cost more than they run. A
graph starts them all at once. What a step reads lies at addresses that depend on its shape alone
(``MetadataBuffers``), and nothing in it waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kernels import CacheDtype, Numerics
from model.deepseek_v4.config import CSA_RATIO
from worker.decode_builder import TABLE_COLUMNS, PaddedShape

if TYPE_CHECKING:
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.forward_batch import DecodeBatch
    from model.parallel.config import ParallelConfig

Forward = Callable[["DecodeBatch"], tuple[Tensor, Tensor]]
Result = TypeVar("Result")

_WARM_UPS = 2  # runs before a capture: the first builds what is built at first use
# Shapes that the GPU kernels of attention and indexer take; others run twins that ask the host.
_HEAD_DIM, _ROPE_DIM, _INDEX_HEADS, _INDEX_DIM = 512, 64, 64, 128


class GraphMemory:
    """Captures work into graphs that share one memory pool: all of them run on one stream, in turn."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle

    def capture(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Record what ``work`` queues, without running it; its result lies where replays write it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may call CUDA meanwhile; only this one must behave.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return graph, result

    def settle(self) -> None:
        """Wait until no graph runs, so that one may be dropped."""
        torch.cuda.synchronize()

    def reset(self) -> None:
        """Every graph is gone: so is the memory they shared."""
        self._pool = None


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    streams: Tensor
    logits: Tensor


class DecodeGraphs:
    """Runs decode steps of any shape, capturing each padded shape when it is first seen.

    Args:
        forward: batch -> (streams [T, R, D], this rank's logits float32 [T, share]).
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._memory = GraphMemory()

    @classmethod
    def batches(cls, most: int) -> list[int]:
        """Every number of requests up to ``most`` that steps are padded to."""
        return sorted({min(cls.shape(n, 1).requests, most) for n in range(1, most + 1)})

    @staticmethod
    def shape(num_requests: int, num_blocks: int) -> PaddedShape:
        """The sizes that a step of this many requests and block table columns is padded to."""
        n = num_requests
        requests = 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8
        blocks = max(TABLE_COLUMNS, 1 << (num_blocks - 1).bit_length())
        return PaddedShape(requests, blocks)

    def run(self, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Streams [T, R, D] and logits [T, share] of a padded batch; valid until the next ``run``."""
        key = (batch.num_rows, *batch.block_table.shape)
        if key not in self._captured:
            self._captured[key] = self._capture(batch)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.streams, captured.logits

    def close(self) -> None:
        """Destroy the graphs: NCCL gives up no communicator that one of them still names."""
        if self._captured:
            self._memory.settle()
        self._captured.clear()
        self._memory.reset()

    def _capture(self, batch: DecodeBatch) -> _Captured:
        # Running a step twice is harmless: caches are addressed by position.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forward(batch)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph, (streams, logits) = self._memory.capture(lambda: self._forward(batch))
        return _Captured(graph, streams, logits)


def graph_obstacle(
    config: DeepSeekV4Config,
    numerics: Numerics,
    parallel: ParallelConfig,
    device: torch.device,
    *,
    pages: CacheDtype,
    walks_experts: bool,
) -> str:
    """Why this model's decode steps cannot be captured on this device; empty when they can.

    Args:
        pages: dtype of the cache pages.
        walks_experts: some layer's experts run one after the other, by bounds that the host reads.
    """
    if device.type != "cuda":
        return f"the device is {device.type}"
    if numerics is not Numerics.RELEASE:
        return f"numerics {numerics.value} run the torch references"
    if parallel.dcp and parallel.world > 1:
        return "parallel.dcp merges scores whose width the host reads"
    if walks_experts:
        return "the experts of a layer have no stacked form, and the host reads their bounds"
    ratios = [config.layer_ratio(layer) for layer in range(config.num_hidden_layers)]
    dims = [("head_dim", config.head_dim, _HEAD_DIM)]
    dims.append(("qk_rope_head_dim", config.qk_rope_head_dim, _ROPE_DIM))
    if CSA_RATIO in ratios:
        if pages is not CacheDtype.FP8:
            return f"kv_cache.dtype is {pages.value}, the indexer's GPU kernels take fp8 pages"
        dims.append(("index_n_heads", config.index_n_heads, _INDEX_HEADS))
        dims.append(("index_head_dim", config.index_head_dim, _INDEX_DIM))
    for name, value, wanted in dims:
        if value != wanted:
            return f"{name} is {value}, the GPU kernels take {wanted}"
    return ""
