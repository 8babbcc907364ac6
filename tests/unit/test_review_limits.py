"""Sizes and shapes that look right and cannot work are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels import CacheDtype
from model.cache_spec import CacheSpec
from model.deepseek_v4.config import DeepSeekV4Config
from model.errors import CapacityError, CheckpointError
from model.parallel.config import ParallelConfig
from tests.helpers.model_setup import SHAPE
from worker.cache_size import size_cache
from worker.config import KVCacheConfig, ModelSource, WorkerConfig


def size(num_blocks: int, cp: int) -> int:
    """Blocks of a rank whose config asks for ``num_blocks``, main pages sharded over ``cp`` ranks."""
    parallel = ParallelConfig(cp=cp, kv_shard="cp")
    config = WorkerConfig(
        model=ModelSource(max_model_len=128),
        parallel=parallel,
        kv_cache=KVCacheConfig(num_blocks=num_blocks, block_size=128),
    )
    spec = CacheSpec(
        config=DeepSeekV4Config.from_dict(SHAPE),
        dtype=CacheDtype.FP32,
        block_size=128,
        max_drafts=0,
        with_mtp=False,
        parallel=parallel,
    )
    return size_cache(spec, config, 0, 4).num_blocks


def test_fewer_blocks_than_shards_are_refused() -> None:
    """Found here: `check` accepted them, and the engine failed after all ranks had started."""
    assert size(4, 4) == 4
    with pytest.raises(CapacityError, match=r"num_blocks 3 .* 4 cp ranks"):
        size(3, 4)


@pytest.mark.parametrize("ratio", [4.0, "4", None, [4], 2])
def test_a_ratio_that_is_no_integer_of_v4_is_refused(tmp_path: Path, ratio: object) -> None:
    """Found here: 4.0 equals 4 and passed, and block sizes became floats."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | {"compress_ratios": [0, ratio, 128, 4, 0]}))
    with pytest.raises(CheckpointError, match=r"compress_ratios\[1\]"):
        DeepSeekV4Config.from_file(path)
