"""Bytes on the wire and who holds what: against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.mesh_view import cut_picture, decode_slices, rank_views, span
from cluster.traffic import expert_traffic, prefill_gather, routed_row_bytes
from kernels import quant_rows
from kernels.page_layout import CacheDtype
from model.cache_spec import CacheSpec
from model.deepseek_v4.shapes import named_shape
from model.parallel.config import ParallelConfig
from model.parallel.partition import Chunk
from model.parallel.row_bytes import pack_routed

FLASH = named_shape("flash")


def spec(parallel: ParallelConfig, *, with_mtp: bool = False) -> CacheSpec:
    return CacheSpec(
        config=FLASH,
        dtype=CacheDtype.FP8,
        block_size=256,
        max_drafts=0,
        with_mtp=with_mtp,
        parallel=parallel,
    )


def test_plain_gather_moves_every_row() -> None:
    """Per token to one other rank: 43 windows of 512 bf16, 21 CSA and 20 HCA rows of float32."""
    per_token = 43 * 512 * 2 + 21 * 4 * (4 * 512 + 4 * 128) + 20 * 4 * 2 * 512
    got = prefill_gather(
        spec(ParallelConfig(cp=4)), "kv_bf16", tokens=16384, start=0, itemsize=2, nodes=1
    )
    assert got.inside == 16384 * per_token * 3
    assert got.between == 0
    assert got.per_token == per_token * 3


def test_compressed_gather_moves_entries_and_halos() -> None:
    tokens, cp = 16384, 4
    got = prefill_gather(
        spec(ParallelConfig(cp=cp)), "compressed", tokens=tokens, start=0, itemsize=2, nodes=1
    )
    entries = tokens // 4 * 21 * (512 + 128) * 2 + tokens // 128 * 20 * 512 * 2
    # After each of its two segments a rank sends 127 window rows and one CSA group of u, g.
    halos = 2 * (43 * 127 * 1024 + 21 * 4 * 4 * (4 * 512 + 4 * 128))
    assert got.inside == (cp - 1) * (entries + cp * halos)
    plain = prefill_gather(
        spec(ParallelConfig(cp=cp)), "kv_bf16", tokens=tokens, start=0, itemsize=2, nodes=1
    )
    assert got.inside < plain.inside / 20


def test_one_rank_moves_nothing() -> None:
    for parallel in (ParallelConfig(), ParallelConfig(tp=2)):
        got = prefill_gather(spec(parallel), "compressed", tokens=512, start=0, itemsize=2, nodes=1)
        assert got.inside == got.between == 0
    alone = expert_traffic(FLASH, ParallelConfig(), tokens=512, itemsize=2, nodes=1)
    assert alone.inside == alone.between == 0


def test_nodes_split_the_same_bytes() -> None:
    parallel = ParallelConfig(cp=4, tp=2)
    one = prefill_gather(spec(parallel), "kv_bf16", tokens=1024, start=0, itemsize=2, nodes=1)
    two = prefill_gather(spec(parallel), "kv_bf16", tokens=1024, start=0, itemsize=2, nodes=2)
    assert two.inside + two.between == one.inside
    # cp ranks 0, 1 share a node, 2, 3 the other: 4 of 12 ordered pairs stay inside.
    assert two.inside * 2 == two.between


def test_ordered_combine_returns_a_row_per_expert() -> None:
    parallel = ParallelConfig(cp=8)
    fast = expert_traffic(FLASH, parallel, tokens=100, itemsize=2, nodes=1)
    ordered = expert_traffic(
        FLASH, replace(parallel, moe_combine="ordered"), tokens=100, itemsize=2, nodes=1
    )
    rows, back = 100 * 43 * 7, 4096 * 2
    reached = 1 - (7 / 8) ** 6
    sent = 4096 + 32 + 32 + 48  # codes, scales, and 6 weights and 6 ids, each padded to 16 bytes
    assert fast.inside == rows * (sent + back)  # a rank of 8 needs 55 % of the rows, and gets all
    assert ordered.inside == pytest.approx(rows * (reached * sent + 6 / 8 * back))
    many = expert_traffic(FLASH, ParallelConfig(cp=16), tokens=100, itemsize=2, nodes=1)
    assert many.inside == pytest.approx(100 * 43 * 15 * (1 - (15 / 16) ** 6) * (sent + back))


def test_who_holds_what() -> None:
    parallel = ParallelConfig(cp=2, tp=2)
    views = rank_views(FLASH, parallel)
    assert [(v.cp_rank, v.tp_rank) for v in views] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [v.heads for v in views] == [(0, 32), (32, 64), (0, 32), (32, 64)]
    assert [v.decode_heads for v in views] == [(0, 16), (32, 48), (16, 32), (48, 64)]
    assert [v.experts for v in views] == [(0, 64), (64, 128), (128, 192), (192, 256)]
    for view in views:  # decode reads a part of what prefill holds
        assert view.heads[0] <= view.decode_heads[0] < view.decode_heads[1] <= view.heads[1]


def test_decode_falls_back_to_tp() -> None:
    groups = replace(FLASH, o_groups=2)
    parallel = ParallelConfig(cp=4, tp=1)
    assert decode_slices(FLASH, parallel) == 4
    assert decode_slices(groups, parallel) == 1
    assert all(v.decode_heads == (0, 64) for v in rank_views(groups, parallel))


def test_spans_and_pictures() -> None:
    assert [span((0, 4)), span((3, 4)), span((2, 2))] == ["0..3", "3", "-"]
    picture = cut_picture([Chunk(0, 100)], ParallelConfig(cp=2, cp_min_tokens=1024))
    assert "cp 0: 0..99" in picture
    assert "cp 1: nothing" in picture


@pytest.mark.parametrize("shape", ["flash", "pro"])
def test_a_routed_row_is_as_long_as_what_is_sent(shape: str) -> None:
    config = named_shape(shape)
    x = torch.randn(3, config.hidden_size)
    ids = torch.zeros(3, config.num_experts_per_tok, dtype=torch.int64)
    for rows, weights, itemsize in (
        (quant_rows(x.bfloat16()), torch.rand(ids.shape), 2),
        (x, torch.rand(ids.shape), 4),
        (x.double(), torch.rand(ids.shape, dtype=torch.float64), 8),
    ):
        assert pack_routed(rows, ids, weights).shape[1] == routed_row_bytes(config, itemsize)
