"""make-tiny: the same bytes for the same seed, a checkpoint that opens, text in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from model.checkpoint.checkpoint import open_checkpoint
from model.checkpoint.source import load_config
from model.checkpoint.tiny import CONTROL_TOKENS, make_tiny, tiny_shape
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import check_mesh
from model.errors import CheckpointError
from model.parallel.config import ParallelConfig


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_same_seed_same_bytes(tiny_template: Path, tmp_path: Path) -> None:
    written = make_tiny(tmp_path / "a" / "b", seed=7)
    again = _contents(tmp_path / "a" / "b")
    assert again == _contents(tiny_template)
    assert {path.name for path in written} == set(again)
    make_tiny(tmp_path / "a" / "b", seed=7)  # into the same folder
    assert _contents(tmp_path / "a" / "b") == again
    make_tiny(tmp_path / "a" / "b", seed=8)
    assert _contents(tmp_path / "a" / "b") != again


def test_default_shape_has_every_kind(tiny_template: Path) -> None:
    config = load_config(path=str(tiny_template), shape="")
    checkpoint = open_checkpoint(tiny_template, config)
    assert checkpoint.config == config
    assert checkpoint.notes == ()
    assert set(config.compress_ratios) == {0, 4, 128}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert config.num_mtp_layers == 1
    assert (config.head_dim, config.qk_rope_head_dim, config.index_head_dim) == (128, 64, 64)
    for cp, tp in [(1, 1), (2, 2), (4, 1), (1, 4)]:
        check_mesh(config, ParallelConfig(cp=cp, tp=tp))
    size = sum(path.stat().st_size for path in tiny_template.iterdir())
    assert size < 10 << 20


def test_config_files(tiny_template: Path) -> None:
    config = json.loads((tiny_template / "config.json").read_text())
    assert config["model_type"] == "deepseek_v4"
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert len(config["compress_ratios"]) == config["num_hidden_layers"] + 1
    generation = json.loads((tiny_template / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


@pytest.fixture(scope="module")
def tokenizer(tiny_template: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_template / "tokenizer.json"))


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    plain = text
    for token in CONTROL_TOKENS:  # hypothesis does find "<think>"
        plain = plain.replace(token, "")
    controls = sum(i < len(CONTROL_TOKENS) for i in ids)
    assert len(ids) - controls == len(plain.encode())  # one token per byte


def test_control_tokens(tokenizer: Tokenizer, tiny_config: DeepSeekV4Config) -> None:
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == list(range(14))
    assert tokenizer.get_vocab_size() == 270 <= tiny_config.vocab_size
    prompt = "<｜begin▁of▁sentence｜><｜User｜>h é<｜Assistant｜></think>"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert ids[:2] == [0, 2]
    assert ids[-2:] == [3, 5]
    assert len(ids) == 4 + 4
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    assert tokenizer.decode(ids) == "h é"


def test_user_shape(tmp_path: Path, small_shape: dict[str, Any]) -> None:
    for key in ("architectures", "torch_dtype", "quantization_config"):
        small_shape = {k: v for k, v in small_shape.items() if k != key}
    make_tiny(tmp_path, seed=1, shape=small_shape)
    config = load_config(path=str(tmp_path), shape="")
    assert config == DeepSeekV4Config.from_dict(small_shape)
    open_checkpoint(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 269}, "vocab_size 269 is too small for the 270 tokens"),
        ({"bos_token_id": 5}, "bos_token_id 5 and eos_token_id 1"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": 100}, "hidden_size 100"),
        ({"hidden_size": 1 << 17, "num_hidden_layers": 5}, "make-tiny writes at most"),
        ({"compress_ratios": [0, 4, 2, 4, 0]}, "compress_ratios[2] = 2"),
        ({"index_head_dim": 96}, "power of two"),
    ],
)
def test_bad_shapes_write_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as info:
        make_tiny(tmp_path / "out", seed=0, shape={**tiny_shape(), **change})
    assert message in str(info.value)
    assert not (tmp_path / "out").exists()


def test_other_checkpoints_are_left_alone(tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"holds another checkpoint \(model\.safetensors\)"):
        make_tiny(tmp_path, seed=0)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
    (tiny_dir / "tokenizer.json").write_text("{}")
    before = _contents(tiny_dir)
    with pytest.raises(CheckpointError, match="holds another checkpoint"):
        make_tiny(tiny_dir, seed=0)
    assert _contents(tiny_dir) == before


def test_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make_tiny(tmp_path / "file", seed=0)
