"""From a checkpoint directory to checked files: the shard index, or one file on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from model.checkpoint.safetensors_file import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    parse_json_object,
)
from model.errors import CheckpointError

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
SHARD_PATTERN: Final = "model-*-of-*.safetensors"


def open_files(directory: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor of a checkpoint directory, all headers checked.

    Raises:
        CheckpointError: no checkpoint there, an index that does not match its shards, a shard name
            that is not a plain file name, a missing shard, or a bad file.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    if (directory / INDEX_NAME).is_file():
        return _open_sharded(directory)
    shards = sorted(path.name for path in directory.glob(SHARD_PATTERN))
    if shards:
        raise CheckpointError(f"{directory}: {len(shards)} shards but no {INDEX_NAME}")
    if not (directory / SINGLE_NAME).is_file():
        raise CheckpointError(f"{directory}: holds neither {INDEX_NAME} nor {SINGLE_NAME}")
    file = SafetensorsFile(directory / SINGLE_NAME)
    return dict.fromkeys(file.entries, file)


def _open_sharded(directory: Path) -> dict[str, SafetensorsFile]:
    weight_map = _weight_map(directory / INDEX_NAME)
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if not path.is_file():
            held = sum(1 for name in weight_map.values() if name == shard)
            raise CheckpointError(
                f"{INDEX_NAME}: shard {shard} ({held} tensors) is missing in {directory}"
            )
        files[shard] = SafetensorsFile(path)
    for name, shard in weight_map.items():
        if name not in files[shard].entries:
            raise CheckpointError(f"{shard}: tensor {name!r}, listed in {INDEX_NAME}, is missing")
    for shard, file in files.items():
        for name in file.entries:
            listed = weight_map.get(name)
            if listed is None:
                raise CheckpointError(f"{shard}: tensor {name!r} is not listed in {INDEX_NAME}")
            if listed != shard:
                raise CheckpointError(
                    f"{shard}: tensor {name!r} is a duplicate, {INDEX_NAME} names {listed}"
                )
    return {name: files[shard] for name, shard in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path.name}: larger than {MAX_HEADER_BYTES} bytes")
        raw = path.read_bytes()
    except OSError as err:
        raise CheckpointError(f"{path.name}: cannot be read: {err.strerror}") from err
    weight_map = parse_json_object(raw, path.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name}: weight_map must be an object of tensor: shard")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _plain_name(shard):
            raise CheckpointError(
                f"{path.name}: tensor {name!r} names shard {shard!r},"
                " allowed: a .safetensors file name without a directory"
            )
    return weight_map


def _plain_name(shard: str) -> bool:
    """A file of the checkpoint directory itself: no separator of any system, no drive, no dots."""
    return (
        shard.endswith(".safetensors")
        and not shard.startswith(".")
        and len(shard) <= 255
        and shard.isprintable()
        and not any(char in shard for char in "/\\:")
    )
