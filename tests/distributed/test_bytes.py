"""Bytes: what a prefill step moves, as ``partition`` predicts it, and what the caches take."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import CacheDtype
from model.cache_spec import CacheSpec, LayerCache
from model.deepseek_v4.config import DeepSeekV4Config
from model.parallel.config import ParallelConfig
from model.parallel.partition import (
    Chunk,
    cut,
    entry_plan,
    find_token,
    group_wants,
    plan_rows,
    window_wants,
)
from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.ranks import run_ranks
from tests.helpers.step_driver import Driver, Part

BASE = Setup(shape=shape_path(), load_mtp=False)
RATIOS = (0, 4, 128, 4)
D, INDEX_D, HIDDEN, STREAMS, FP32 = 128, 64, 128, 4, 4
# (start, end, tail positions) of two requests, step after step.
STEPS = (
    ((0, 131, (128,)), (0, 700, (512,))),
    ((131, 520, (256, 384)), (700, 703, ())),
    ((520, 523, ()), (703, 1025, (896, 1024))),
)


def predicted(setup: Setup, step: tuple[tuple[int, int, tuple[int, ...]], ...]) -> int:
    """Bytes that one rank sends (and receives) in the cp group during a prefill step that samples."""
    chunks = tuple(Chunk(start, end) for start, end, _ in step)
    tails = [list(t) for _, _, t in step]
    segments = cut(chunks, setup.cp, setup.min_tokens)
    publish = setup.gather == "kv_bf16"
    total = 0
    for ratio in RATIOS:
        own, shared = window_wants(chunks, segments, 128, tails)
        plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=publish)
        total += plan.sent_rows(0) * D * FP32
        if not ratio:
            continue
        csa = ratio == 4
        own, shared = group_wants(chunks, segments, ratio, csa, tails, everyone=publish)
        plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=publish)
        row = 4 * D + 4 * INDEX_D if csa else 2 * D
        total += plan.sent_rows(0) * row * FP32
        entries = entry_plan(chunks, segments, ratio, everyone=publish)
        total += entries.sent_rows(0) * (D + (INDEX_D if csa else 0)) * FP32
        if setup.shard == "cp":
            owned = [0] * setup.cp
            for chunk in chunks:
                for i in range(-(-chunk.end // setup.block_size)):
                    owned[i % setup.cp] += 1
            page = setup.block_size // ratio * D * FP32
            page = -(-page // 512) * 512
            total += max(owned) * (setup.cp - 1) * page
    sampled = [0] * setup.cp
    for i, chunk in enumerate(chunks):
        sampled[find_token(segments, i, chunk.end - 1)[0]] += 1
    return total + max(sampled) * (setup.cp - 1) * STREAMS * HIDDEN * FP32


def count_bytes(rank: int, world: int, setups: list[Setup]) -> list[Any]:
    """Per setup and step (sent, received) of the cp group, then of the world group."""
    found = []
    for setup in setups:
        driver = Driver(setup, rank)
        requests = [driver.open(stream(i, STEPS[-1][i][1]), slot=i) for i in range(2)]
        steps = []
        for step in STEPS:
            tail = iter(range(driver.info.num_tails))
            parts = []
            for request, (start, end, tails) in zip(requests, step, strict=True):
                assert request.computed == start
                saves = tuple((position, next(tail)) for position in tails)
                # Sampling hands the last row to every rank; the drawn token is not kept.
                parts.append(
                    Part(request=request, count=end - start, tails=saves, sample=True, logits=False)
                )
            groups = (driver.mesh.cp, driver.mesh.world)
            for group in groups:
                group.stats.reset()
            texts = [list(r.tokens) for r in requests]
            driver.prefill(*parts)
            for request, text in zip(requests, texts, strict=True):
                request.tokens = text
            steps.append([(g.stats.sent, g.stats.received) for g in groups])
        found.append(steps)
        driver.close()
    return found


SETUPS = {
    2: [
        replace(BASE, cp=2, gather="kv_bf16"),
        replace(BASE, cp=2, gather="compressed"),
        replace(BASE, cp=2, gather="compressed", shard="cp", min_tokens=200),
    ],
    4: [
        replace(BASE, cp=4, gather="compressed", shard="cp"),
        replace(BASE, cp=4, gather="kv_bf16"),
        replace(BASE, cp=2, tp=2, gather="compressed"),
    ],
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_a_prefill_step_moves_the_bytes_that_partition_predicts(world: int) -> None:
    """Every rank, step by step: windows, compressor rows, entries, sharded pages, sampled rows."""
    ranks = run_ranks(count_bytes, world, SETUPS[world], timeout=280)
    for i, setup in enumerate(SETUPS[world]):
        for number, step in enumerate(STEPS):
            for found in ranks:
                (sent, received), _ = found[i][number]
                assert sent == received == predicted(setup, step), (setup.name, number)
            moved = [found[i][number][1] for found in ranks]
            assert sum(s for s, _ in moved) == sum(r for _, r in moved) > 0
    if world == 2:  # the point of the compressed gather
        assert sum(predicted(SETUPS[2][0], s) for s in STEPS) > 2 * sum(
            predicted(SETUPS[2][1], s) for s in STEPS
        )


def tensors_of(driver: Driver) -> list[Tensor]:
    """Every tensor that the pool holds, found by looking, not by asking."""
    found = [v for v in vars(driver.pool).values() if isinstance(v, Tensor)]
    for layer in driver.pool.layers:
        found += [v for f in fields(layer) if isinstance(v := getattr(layer, f.name), Tensor)]
    return found


@pytest.mark.parametrize("numerics", ["fp32", "release"])
@pytest.mark.parametrize("block_size", [128, 256, 384])
@pytest.mark.parametrize("mtp", [0, 3])
def test_printed_capacity_is_what_was_allocated(numerics: str, block_size: int, mtp: int) -> None:
    driver = Driver(replace(BASE, numerics=numerics, block_size=block_size, mtp=mtp, num_blocks=21))
    held = tensors_of(driver)
    assert driver.info.allocated_bytes == sum(t.nbytes for t in held)
    # Nothing larger hides behind a view.
    assert driver.info.allocated_bytes == sum(t.untyped_storage().nbytes() for t in held)
    assert len({t.untyped_storage().data_ptr() for t in held if t.nbytes}) == sum(
        1 for t in held if t.nbytes
    )
    assert driver.info.num_blocks == 21
    assert len(driver.pool.layers) == 4 + (mtp > 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("block_size", [128, 256, 384, 1024])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_page_views_stay_inside_their_pools_vllm_43988(
    dtype: str, block_size: int, shards: int
) -> None:
    """A page holds block_size // ratio entries; the last byte of the last entry exists."""
    spec = CacheSpec(
        config=DeepSeekV4Config.from_file(Path(shape_path())),
        dtype=CacheDtype(dtype),
        block_size=block_size,
        max_drafts=1,
        with_mtp=True,
        parallel=ParallelConfig(cp=shards, kv_shard="cp" if shards > 1 else "replicate"),
    )
    blocks, slots, tails = 4 * shards + 1, 3, 2
    total = 0
    for number, ratio in enumerate(spec.ratios):
        layer = LayerCache.allocate(
            spec,
            number,
            num_blocks=blocks,
            num_slots=slots,
            num_tails=tails,
            device=torch.device("cpu"),
        )
        total += layer.nbytes
        local = 4 + 1 if shards > 1 else blocks
        pools = [
            (layer.window, layer.window_layout, slots),
            (layer.tail_window, layer.tail_layout, tails),
        ]
        if ratio:
            assert layer.main_layout.entries_per_page == block_size // ratio
            pools.append((layer.main, layer.main_layout, local))
        if ratio == 4:
            assert layer.index_layout.entries_per_page == block_size // 4
            pools.append((layer.index, layer.index_layout, blocks))
        for pool, layout, pages in pools:
            assert pool.shape == (pages, layout.page_bytes)
            assert pool.nbytes == pages * layout.page_bytes
            used = layout.scale_offset + layout.entries_per_page * layout.scale_bytes
            assert layout.page_bytes - layout.alignment < used <= layout.page_bytes
            assert layout.page_bytes % layout.alignment == 0
    streams = (slots * 2 + tails) * STREAMS * HIDDEN * FP32
    planned = (
        spec.pool_bytes(blocks) + slots * spec.slot_bytes(FP32) + tails * spec.tail_bytes(FP32)
    )
    assert total + streams == planned
