"""The two official shapes, in the form of their ``config.json``, and what ``model.shape`` may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.deepseek_v4.config import DeepSeekV4Config
from model.errors import CheckpointError

_FOLDER = Path(__file__).parent

SHAPE_NAMES = ("flash", "pro")


def named_shape(name: str) -> DeepSeekV4Config:
    """The configuration of an official model: ``flash`` or ``pro``.

    Raises:
        CheckpointError: another name.
    """
    return DeepSeekV4Config.from_dict(named_shape_dict(name), where=f"{name}.json")


def named_shape_dict(name: str) -> dict[str, Any]:
    """The ``config.json`` object behind ``named_shape``, a new one at every call."""
    if name not in SHAPE_NAMES:
        allowed = ", ".join(SHAPE_NAMES)
        raise CheckpointError(f"model.shape = {name!r}, allowed: {allowed}, or a config.json file")
    found: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def resolve_shape(shape: str) -> DeepSeekV4Config:
    """The configuration that ``model.shape`` names: an official name or a ``config.json`` file.

    Raises:
        CheckpointError: neither a known name nor a usable file.
    """
    if shape in SHAPE_NAMES:
        return named_shape(shape)
    path = Path(shape)
    return DeepSeekV4Config.from_file(path) if path.is_file() else named_shape(shape)
