"""Sizes that decode steps are padded to."""

from __future__ import annotations

import torch

from kernels import CacheDtype, Numerics
from model.checkpoint.source import load_config
from model.parallel.config import ParallelConfig
from worker.cuda_graph import DecodeGraphs, graph_obstacle


def test_padded_sizes() -> None:
    assert DecodeGraphs.batches(5) == [1, 2, 4, 5]
    assert DecodeGraphs.batches(20) == [1, 2, 4, 8, 16, 20]
    assert [DecodeGraphs.shape(n, 1).requests for n in (1, 3, 9, 64)] == [1, 4, 16, 64]
    assert DecodeGraphs.shape(1, 17).blocks == 32


def obstacle(*, pages: CacheDtype = CacheDtype.FP8, walks_experts: bool = False) -> str:
    return graph_obstacle(
        load_config(path="", shape="flash"),
        Numerics.RELEASE,
        ParallelConfig(),
        torch.device("cuda"),
        pages=pages,
        walks_experts=walks_experts,
    )


def test_what_the_host_reads_is_not_captured() -> None:
    assert not obstacle()
    assert "kv_cache.dtype is bf16" in obstacle(pages=CacheDtype.BF16)
    assert "experts" in obstacle(walks_experts=True)
