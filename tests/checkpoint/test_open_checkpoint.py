"""Directories: index, shards, names, dtypes and shapes; DSpark and Base releases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from model.checkpoint.loader import load_weights
from model.checkpoint.source import load_config, open_source
from model.checkpoint.writer import write_checkpoint
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import WeightSlice, inventory, weight_plan
from model.errors import CheckpointError
from model.parallel.config import MeshCoord

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = [ROOT / "assets" / "tiny-python"]
SAMPLES += sorted(p.parent for p in (ROOT / "tests" / "golden").glob("*/model.safetensors"))
CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
SINK = "layers.1.attn.attn_sink"

Tensors = dict[str, Tensor]
Make = Callable[[DeepSeekV4Config], Tensors]


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read(WeightSlice(name=name, spec=inventory(checkpoint.config)[name]))


def _refusal(directory: Path, config: DeepSeekV4Config) -> str:
    with pytest.raises(CheckpointError) as info:
        open_checkpoint(directory, config)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("directory", SAMPLES, ids=lambda path: path.name)
def test_samples_open_and_load(directory: Path) -> None:
    config = load_config(path=str(directory), shape="")
    checkpoint = open_checkpoint(directory, config)
    index = json.loads((directory / INDEX).read_text())
    assert set(checkpoint.files) == set(index["weight_map"])
    assert checkpoint.notes == ()
    plan = weight_plan(config, MeshCoord(cp=1, tp=1, rank=0), load_mtp=config.num_mtp_layers > 0)
    assert load_weights(plan, checkpoint, CPU).nbytes == index["metadata"]["total_size"]


def test_values_survive(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    """A sharded file read back is what the seed makes; slices are cut from it."""
    checkpoint = open_checkpoint(tiny_dir, tiny_config)
    source = open_source(tiny_config, path="", load_format="random", seed=7, device=CPU)
    assert len({file.path.name for file in checkpoint.files.values()}) > 1
    for rank in range(2):
        plan = weight_plan(tiny_config, MeshCoord(cp=1, tp=2, rank=rank), load_mtp=True)
        for item in plan:
            found, expected = checkpoint.read(item), source.read(item)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), item.name


def test_tensors_that_do_not_fit_are_listed(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = whole_tensors(small_config)
    del tensors["norm.weight"]
    tensors["norm.wight"] = torch.zeros(160, dtype=torch.bfloat16)
    tensors[SINK] = torch.zeros(9)
    tensors["head.weight"] = tensors["head.weight"].half()
    tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].int()
    write_checkpoint(tmp_path, tensors)
    text = _refusal(tmp_path, small_config)
    assert f"{len(inventory(small_config))} tensors do not fit" in text
    assert ": 5 of" in text
    for part in (
        "norm.weight is missing from model.safetensors",
        "norm.wight in model.safetensors is unexpected",
        f"{SINK} in model.safetensors is F32 [9], expected F32 [8]",
        "head.weight in model.safetensors is F16 [275, 160], expected BF16 [275, 160]",
        "tid2eid in model.safetensors is I32 [275, 2], expected I64 [275, 2]",
    ):
        assert part in text


def test_long_lists_are_cut(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = whole_tensors(small_config)
    write_checkpoint(tmp_path, {k: v for k, v in tensors.items() if ".experts." not in k})
    text = _refusal(tmp_path, small_config)
    missing = sum(1 for name in tensors if ".experts." in name)
    assert text.count("is missing from") == 8
    assert text.endswith(f"; and {missing - 8} more")


def _edit_index(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors",
     "c:model.safetensors", ".hidden.safetensors", "config.json", "", "x\n.safetensors", 3, None],
)  # fmt: skip
def test_shard_names_stay_in_the_directory(
    tiny_dir: Path, tiny_config: DeepSeekV4Config, shard: Any
) -> None:
    _edit_index(tiny_dir, lambda weight_map: weight_map.update({SINK: shard}))
    text = _refusal(tiny_dir, tiny_config)
    assert text.startswith(f"{INDEX}: tensor '{SINK}' names shard {shard!r}")


def test_outside_file_is_not_read(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    """Even where the path that the index names exists."""
    shutil.copy(tiny_dir / "model-00001-of-00004.safetensors", tiny_dir.parent / "out.safetensors")
    _edit_index(tiny_dir, lambda m: m.update(dict.fromkeys(m, "../out.safetensors")))
    assert "allowed: a .safetensors file name without a directory" in _refusal(
        tiny_dir, tiny_config
    )


def test_missing_shard(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    (tiny_dir / "model-00002-of-00004.safetensors").unlink()
    text = _refusal(tiny_dir, tiny_config)
    assert "shard model-00002-of-00004.safetensors" in text
    assert "is missing" in text


def test_truncated_shard(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    path = tiny_dir / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    text = _refusal(tiny_dir, tiny_config)
    assert text.startswith("model-00003-of-00004.safetensors: tensor ")
    assert "truncated" in text


def test_index_and_shards_must_agree(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    _edit_index(tiny_dir, lambda weight_map: weight_map.pop(SINK))
    assert f"tensor '{SINK}' is not listed in {INDEX}" in _refusal(tiny_dir, tiny_config)


def test_index_names_the_wrong_shard(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    wrong = "model-00004-of-00004.safetensors"
    _edit_index(tiny_dir, lambda weight_map: weight_map.update({SINK: wrong}))
    assert f"{wrong}: tensor '{SINK}', listed in {INDEX}, is missing" == _refusal(
        tiny_dir, tiny_config
    )


def test_tensor_in_two_shards(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = whole_tensors(small_config)
    write_checkpoint(tmp_path, tensors, max_shard_bytes=1 << 20)
    first = json.loads((tmp_path / INDEX).read_text())["weight_map"][SINK]
    write_checkpoint(tmp_path, {SINK: tensors[SINK], "x": torch.zeros(1)})
    (tmp_path / "model.safetensors").rename(tmp_path / "extra.safetensors")
    _edit_index(tmp_path, lambda weight_map: weight_map.update({"x": "extra.safetensors"}))
    assert f"extra.safetensors: tensor '{SINK}' is a duplicate, {INDEX} names {first}" == _refusal(
        tmp_path, small_config
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{}", "weight_map must be an object"),
        ('{"weight_map": []}', "weight_map must be an object"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_index(tiny_dir: Path, tiny_config: DeepSeekV4Config, text: str, message: str) -> None:
    (tiny_dir / INDEX).write_text(text)
    refusal = _refusal(tiny_dir, tiny_config)
    assert refusal.startswith(INDEX)
    assert message in refusal


def test_shards_without_index(tiny_dir: Path, tiny_config: DeepSeekV4Config) -> None:
    (tiny_dir / INDEX).unlink()
    assert f"4 shards but no {INDEX}" in _refusal(tiny_dir, tiny_config)


def test_no_checkpoint(tmp_path: Path, tiny_config: DeepSeekV4Config) -> None:
    assert "holds neither" in _refusal(tmp_path, tiny_config)
    assert "no such checkpoint directory" in _refusal(tmp_path / "gone", tiny_config)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_config(path=str(tmp_path / "gone"), shape="")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(path=str(tmp_path), shape="")
    with pytest.raises(CheckpointError, match=r"model\.path and model\.shape are both empty"):
        load_config(path="", shape="")
    with pytest.raises(CheckpointError, match=r"auto needs model\.path"):
        open_source(tiny_config, path="", load_format="auto", seed=0, device=CPU)


def _drafts() -> Tensors:
    """Some of the tensors that the 0731 release has under mtp.*."""
    return {
        "mtp.0.main_proj.weight": torch.zeros(160, 480).to(torch.float8_e4m3fn),
        "mtp.0.main_proj.scale": torch.full((2, 4), 127, dtype=torch.uint8),
        "mtp.0.main_norm.weight": torch.ones(160, dtype=torch.bfloat16),
        "mtp.1.attn.attn_sink": torch.zeros(8),
        "mtp.2.markov_head.markov_w1.weight": torch.zeros(275, 16, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("by", ["tensors", "config"])
def test_dspark_release(
    tmp_path: Path, small_shape: dict[str, Any], whole_tensors: Make, by: str
) -> None:
    config = DeepSeekV4Config.from_dict(small_shape)
    tensors = {k: v for k, v in whole_tensors(config).items() if not k.startswith("mtp.")}
    if by == "config":
        config = DeepSeekV4Config.from_dict({**small_shape, "dspark_block_size": 5})
    write_checkpoint(tmp_path, tensors | _drafts())
    checkpoint = open_checkpoint(tmp_path, config)
    assert checkpoint.config.dspark
    assert checkpoint.config.num_mtp_layers == 0
    assert checkpoint.notes == ("0731 release: DSpark drafts not used, MTP off",)
    plan = weight_plan(checkpoint.config, MeshCoord(cp=1, tp=1, rank=0), load_mtp=False)
    assert {item.name for item in plan} == set(tensors)
    load_weights(plan, checkpoint, CPU)


def test_dspark_release_still_needs_the_main_model(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = {k: v for k, v in whole_tensors(small_config).items() if not k.startswith("mtp.")}
    del tensors[SINK]
    write_checkpoint(tmp_path, tensors | _drafts())
    text = _refusal(tmp_path, small_config)
    assert ": 1 of" in text
    assert f"{SINK} is missing" in text


def test_unused_mtp_blocks(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = whole_tensors(small_config)
    tensors["mtp.1.attn.attn_sink"] = torch.zeros(8)
    write_checkpoint(tmp_path, tensors)
    assert "mtp.1.attn.attn_sink in model.safetensors is unexpected" in _refusal(
        tmp_path, small_config
    )
    open_checkpoint(tmp_path, replace(small_config, num_nextn_predict_layers=2))


@pytest.mark.parametrize("declared", [True, False])
def test_base_release(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make, declared: bool
) -> None:
    base = replace(small_config, expert_dtype="fp8")
    tensors = whole_tensors(base)
    write_checkpoint(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path, base if declared else small_config)
    assert checkpoint.config == base
    assert checkpoint.notes == ("Base release: routed experts are FP8",)
    weights = load_weights(
        weight_plan(base, MeshCoord(cp=2, tp=1, rank=1), load_mtp=True), checkpoint, CPU
    )
    expert = weights.block("layers.2.ffn.experts.7.w2.weight")
    assert expert.data.dtype == torch.float8_e4m3fn
    assert expert.scale is not None
    assert expert.scale.shape == (2, 1)


def test_one_fp8_expert_among_fp4_is_an_error(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    name = "layers.2.ffn.experts.1.w1.weight"
    tensors = whole_tensors(small_config)
    tensors[name] = torch.zeros(96, 160).to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path, tensors)
    text = _refusal(tmp_path, small_config)
    assert ": 1 of" in text
    assert f"{name} in model.safetensors is F8_E4M3 [96, 160], expected I8 [96, 80]" in text


def test_same_bytes_under_another_dtype(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = whole_tensors(small_config)
    scale, packed = "layers.0.attn.wkv.scale", "layers.0.ffn.experts.0.w1.weight"
    write_checkpoint(
        tmp_path,
        tensors | {packed: tensors[packed].view(torch.uint8)},
        dtypes={scale: "U8", packed: "U8"},
    )
    checkpoint = open_checkpoint(tmp_path, small_config)
    assert torch.equal(_read(checkpoint, scale), tensors[scale])
    assert torch.equal(_read(checkpoint, packed), tensors[packed])


def test_float32_scales_of_base_releases(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make
) -> None:
    tensors = whole_tensors(small_config)
    good, bad = "layers.0.attn.wkv.scale", "layers.1.attn.wkv.scale"
    powers = torch.exp2(tensors[good].float() - 127)
    write_checkpoint(tmp_path, tensors | {good: powers, bad: torch.full_like(powers, 0.3)})
    checkpoint = open_checkpoint(tmp_path, small_config)
    assert torch.equal(_read(checkpoint, good), tensors[good])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {bad} holds float32"):
        _read(checkpoint, bad)


@pytest.mark.parametrize("value", [-1, 8])
def test_expert_table_out_of_range(
    tmp_path: Path, small_config: DeepSeekV4Config, whole_tensors: Make, value: int
) -> None:
    tensors = whole_tensors(small_config)
    name = "layers.0.ffn.gate.tid2eid"
    tensors[name][100, 1] = value
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds expert ids .*allowed: 0\.\.7"):
        _read(open_checkpoint(tmp_path, small_config), name)
