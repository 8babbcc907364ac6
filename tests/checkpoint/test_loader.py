"""Weights are taken by name, once, and all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint.checkpoint import open_checkpoint
from model.checkpoint.loader import WeightDict, WeightUseError, load_weights
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import plan_bytes, weight_plan
from model.parallel.config import MeshCoord

CPU = torch.device("cpu")


@pytest.fixture
def weights(tiny_template: Path, tiny_config: DeepSeekV4Config) -> WeightDict:
    plan = weight_plan(tiny_config, MeshCoord(cp=2, tp=2, rank=3), load_mtp=False)
    return load_weights(plan, open_checkpoint(tiny_template, tiny_config), CPU)


def test_formats(weights: WeightDict) -> None:
    fp8 = weights.block("layers.1.attn.wo_b.weight")
    assert fp8.data.dtype == torch.float8_e4m3fn
    assert fp8.data.shape == (256, 128)
    assert fp8.scale is not None
    assert fp8.scale.dtype == torch.uint8
    assert fp8.scale.shape == (2, 1)
    fp4 = weights.block("layers.1.ffn.experts.7.w1.weight")
    assert fp4.data.dtype == torch.int8
    assert fp4.data.shape == (128, 128)
    assert fp4.scale is not None
    assert fp4.scale.shape == (128, 8)
    bf16 = weights.block("layers.1.attn.compressor.wkv.weight")
    assert bf16.data.dtype == torch.bfloat16
    assert bf16.scale is None
    assert weights.tensor("layers.1.attn.attn_sink").dtype == torch.float32
    assert weights.tensor("layers.0.ffn.gate.tid2eid").dtype == torch.int64
    assert weights.tensor("head.weight").shape == (72, 256)
    assert not weights.has("layers.1.ffn.experts.0.w1.weight")


@pytest.mark.parametrize(("rank", "offset"), [(0, 0), (1, 64), (2, 0), (3, 64)])
def test_offsets_inside_scale_blocks(
    tiny_template: Path, tiny_config: DeepSeekV4Config, rank: int, offset: int
) -> None:
    """64 rows of wo_a per rank at tp 4: every other slice starts inside a block."""
    plan = weight_plan(tiny_config, MeshCoord(cp=1, tp=4, rank=rank), load_mtp=True)
    held = load_weights(plan, open_checkpoint(tiny_template, tiny_config), CPU)
    rows = held.block("layers.3.attn.wo_a.weight")
    assert (rows.row_offset, rows.col_offset) == (offset, 0)
    assert rows.data.shape == (64, 256)
    cols = held.block("mtp.0.attn.wo_b.weight")
    assert (cols.row_offset, cols.col_offset) == (0, offset)
    assert cols.data.shape == (256, 64)


def test_each_weight_is_taken_once(weights: WeightDict) -> None:
    norm = "layers.0.attn_norm.weight"
    assert weights.has(norm)
    weights.tensor(norm)
    assert not weights.has(norm)
    with pytest.raises(WeightUseError, match=rf"{norm} was taken already"):
        weights.tensor(norm)
    with pytest.raises(WeightUseError, match="is not held by this rank"):
        weights.tensor("layers.0.attn.norm.weight")


def test_finish_names_what_was_left(weights: WeightDict) -> None:
    with pytest.raises(WeightUseError, match="weights were never taken"):
        weights.finish()
    for name in list(weights._slices):
        if name == "norm.weight" or not weights.has(name):
            continue
        if len(weights._slices[name].shape) == 2 and name.endswith(".weight"):
            weights.block(name)
        elif not name.endswith(".scale"):
            weights.tensor(name)
    with pytest.raises(WeightUseError, match=r"1 weights were never taken: norm\.weight"):
        weights.finish()
    weights.tensor("norm.weight")
    weights.finish()


def test_wrong_kind(weights: WeightDict) -> None:
    with pytest.raises(WeightUseError, match="take it with block"):
        weights.tensor("layers.0.attn.wkv.weight")
    for name in ("norm.weight", "layers.0.attn.wkv.scale", "hc_head_fn", "nothing.weight"):
        with pytest.raises(WeightUseError, match="is not a 2-D weight"):
            weights.block(name)


def test_progress_counts_bytes(tiny_template: Path, tiny_config: DeepSeekV4Config) -> None:
    plan = weight_plan(tiny_config, MeshCoord(cp=1, tp=2, rank=1), load_mtp=True)
    calls: list[tuple[int, int]] = []
    loaded = load_weights(
        plan,
        open_checkpoint(tiny_template, tiny_config),
        CPU,
        lambda done, total: calls.append((done, total)),
    )
    total = plan_bytes(plan)
    assert loaded.nbytes == total
    assert len(calls) == len(plan)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_loaded_weights_outlive_the_file(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    """Tensors are copies: nothing that happens to the file later reaches the model."""
    plan = weight_plan(tiny_config, MeshCoord(cp=1, tp=1, rank=0), load_mtp=True)
    loaded = load_weights(plan, open_checkpoint(tiny_dir, tiny_config), CPU)
    before = loaded.tensor("embed.weight")
    copy = before.clone()
    for path in tiny_dir.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(before, copy)
