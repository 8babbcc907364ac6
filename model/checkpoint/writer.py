"""Writes checkpoints in the official format: safetensors files, sharded with an index when asked."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from model.checkpoint.index import INDEX_NAME, SINGLE_NAME
from model.checkpoint.safetensors_file import FILE_DTYPE_BYTES
from model.errors import CheckpointError

# uint8 is how this project holds E8M0 scales; ``dtypes`` names other uses.
_DTYPE_NAMES: Final = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "F8_E8M0",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, or shards of at most about ``max_shard_bytes`` and their index.

    Args:
        directory: an existing directory.
        tensors: by official name; uint8 means E8M0 scales.
        max_shard_bytes: data bytes per shard; a larger tensor gets a shard of its own.
        dtypes: file dtype names for tensors whose torch dtype does not say it, e.g. ``U8``.

    Returns:
        The files written, the index last.

    Raises:
        CheckpointError: a dtype the format does not have here.
    """
    if max_shard_bytes is None:
        path = directory / SINGLE_NAME
        write_safetensors(path, tensors, dtypes=dtypes)
        return [path]
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    paths, weight_map, total = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path, shard, dtypes=dtypes)
        paths.append(path)
        weight_map.update(dict.fromkeys(shard, path.name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*paths, directory / INDEX_NAME]


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, dtypes: Mapping[str, str] | None = None
) -> None:
    """Write one file; equal tensors give equal bytes. See ``write_checkpoint`` for the arguments.

    Raises:
        CheckpointError: a dtype the format does not have here.
    """
    named = dtypes or {}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned data
    offset = 0
    for name in order:
        tensor = tensors[name]
        dtype = named.get(name) or _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None or FILE_DTYPE_BYTES.get(dtype) != tensor.element_size():
            raise CheckpointError(f"{path.name}: tensor {name} of {tensor.dtype} has no file dtype")
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().tobytes())
