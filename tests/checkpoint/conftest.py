"""One tiny checkpoint per session, and hand-made safetensors files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint.random_source import RandomSource
from model.checkpoint.tiny import make_tiny, tiny_shape
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import WeightSlice, inventory

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_config() -> DeepSeekV4Config:
    return DeepSeekV4Config.from_dict(tiny_shape())


@pytest.fixture(scope="session")
def small_shape() -> dict[str, Any]:
    """Every layer kind with little in it, and a vocabulary that no rank count divides."""
    return {
        **tiny_shape(),
        "vocab_size": 275,
        "hidden_size": 160,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 128, 0],
        "num_hash_layers": 1,
        "o_lora_rank": 48,
    }


@pytest.fixture(scope="session")
def small_config(small_shape: dict[str, Any]) -> DeepSeekV4Config:
    return DeepSeekV4Config.from_dict(small_shape)


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny(directory, seed=7)
    return directory


@pytest.fixture
def tiny_dir(tiny_template: Path, tmp_path: Path) -> Path:
    """A copy that the test may break."""
    return Path(shutil.copytree(tiny_template, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def whole_tensors() -> Callable[[DeepSeekV4Config], dict[str, Tensor]]:
    """Every tensor of a config, random, uncut."""

    def make(config: DeepSeekV4Config) -> dict[str, Tensor]:
        source = RandomSource(config, 3, CPU)
        return {
            name: source.read(WeightSlice(name=name, spec=spec))
            for name, spec in inventory(config).items()
        }

    return make


@pytest.fixture
def raw_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a safetensors file from a header object (or header bytes) and data, right or wrong."""

    def write(
        header: Mapping[str, Any] | bytes,
        data: bytes = b"",
        *,
        length: int | None = None,
        name: str = "model.safetensors",
    ) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return write
