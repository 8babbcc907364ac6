"""Which weights a ``model.*`` section names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from model.checkpoint.checkpoint import open_checkpoint
from model.checkpoint.loader import WeightSource
from model.checkpoint.random_source import RandomSource
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.shapes import resolve_shape
from model.errors import CheckpointError


def load_config(*, path: str, shape: str) -> DeepSeekV4Config:
    """The config that ``model.shape`` names, or else that of ``model.path``.

    Raises:
        CheckpointError: neither is given, or the config cannot be used.
    """
    if shape:
        return resolve_shape(shape)
    if not path:
        raise CheckpointError("model.path and model.shape are both empty; one must be given")
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    return DeepSeekV4Config.from_file(Path(path) / "config.json")


def open_source(
    config: DeepSeekV4Config,
    *,
    path: str,
    load_format: Literal["auto", "safetensors", "random"],
    seed: int,
    device: torch.device,
) -> WeightSource:
    """The weights for ``config``: the checkpoint at ``path``, or random ones.

    ``auto`` means the checkpoint at ``path``. The returned source's own ``config`` is the one to
    build the model from: the tensors may show a DSpark or a Base release.

    Raises:
        CheckpointError: no path where one is needed, or a checkpoint that cannot be used.
    """
    if load_format == "random":
        return RandomSource(config, seed, device)
    if not path:
        raise CheckpointError(
            f"model.load_format {load_format} needs model.path; random weights need"
            " model.load_format random"
        )
    return open_checkpoint(Path(path), config)
