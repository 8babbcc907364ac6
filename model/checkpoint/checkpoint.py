"""An official release on disk, compared with the inventory of its config before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint.index import INDEX_NAME, SINGLE_NAME, open_files
from model.checkpoint.safetensors_file import SafetensorsFile
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import TensorSpec, WeightSlice, inventory, routed_expert
from model.errors import CheckpointError

# What a tensor of each checkpoint dtype is on the device. E8M0 scales stay bytes (value 2^(b-127)).
TORCH_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "I8": torch.int8,
    "I64": torch.int64,
}
# Dtype names with the same bytes, seen in files made by other tools.
_SAME_BYTES: Final = {"I8": ("I8", "U8"), "F8_E8M0": ("F8_E8M0", "U8")}
_DSPARK_TENSOR: Final = re.compile(r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\.")
_SHOWN_PROBLEMS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint.

    Args:
        directory: where it lies.
        config: the given config, with ``dspark`` and ``expert_dtype`` as the tensors show them.
        files: the file of every tensor that the inventory of ``config`` lists.
        notes: one line each for what is unusual about the release, to be printed.
    """

    directory: Path
    config: DeepSeekV4Config
    files: Mapping[str, SafetensorsFile]
    notes: tuple[str, ...]

    def order(self, plan: Iterable[WeightSlice]) -> list[WeightSlice]:
        """The plan in file order, so that reading is sequential."""

        def place(item: WeightSlice) -> tuple[str, int]:
            file = self.files[item.name]
            return file.path.name, file.entries[item.name].start

        return sorted(plan, key=place)

    def read(self, item: WeightSlice) -> Tensor:
        """A slice as a new CPU tensor of the slice's shape and the dtype of ``TORCH_DTYPES``.

        Raises:
            CheckpointError: float32 scales that are no powers of two, or a ``tid2eid`` entry that
                is no expert.
        """
        file = self.files[item.name]
        raw = file.read(item.name, item.rows, item.cols)
        if item.spec.dtype == "F8_E8M0" and file.entries[item.name].dtype == "F32":
            raw = _power_of_two_bytes(raw.view(np.float32), item.name, file)
        tensor = torch.from_numpy(raw).view(TORCH_DTYPES[item.spec.dtype]).reshape(item.shape)
        if item.name.endswith(".tid2eid") and tensor.numel():
            low, high, experts = int(tensor.min()), int(tensor.max()), self.config.n_routed_experts
            if low < 0 or high >= experts:
                raise CheckpointError(
                    f"{file.path.name}: tensor {item.name} holds expert ids {low}..{high},"
                    f" allowed: 0..{experts - 1}"
                )
        return tensor

    def close(self) -> None:
        """Unmap all files."""
        for file in set(self.files.values()):
            file.close()


def open_checkpoint(directory: Path, config: DeepSeekV4Config) -> Checkpoint:
    """Open a checkpoint directory and check every header, name, dtype and shape; reads no tensor.

    Recognised besides the plain release: DSpark (0731), whose ``mtp.*`` tensors are not used, and
    Base releases, whose routed experts are FP8 even where ``config.json`` does not say so.

    Raises:
        CheckpointError: bad files, or tensors that are missing, unexpected, mis-shaped or mis-typed
            (one message that lists the first of them with their files).
    """
    files = open_files(directory)
    notes: list[str] = []
    if not config.dspark and any(_DSPARK_TENSOR.match(name) for name in files):
        config = replace(config, dspark=True)
    if config.dspark:
        notes.append("0731 release: DSpark drafts not used, MTP off")
    experts = {
        file.entries[name].dtype
        for name, file in files.items()
        if name.endswith(".weight") and routed_expert(name) is not None
        if not (config.dspark and name.startswith("mtp."))
    }
    if config.expert_dtype == "fp4" and experts == {"F8_E4M3"}:
        config = replace(config, expert_dtype="fp8")
    if config.expert_dtype == "fp8":
        notes.append("Base release: routed experts are FP8")
    specs = inventory(config)
    _check_tensors(directory, config, specs, files)
    return Checkpoint(
        directory=directory,
        config=config,
        files={name: files[name] for name in specs},
        notes=tuple(notes),
    )


def _check_tensors(
    directory: Path,
    config: DeepSeekV4Config,
    specs: Mapping[str, TensorSpec],
    files: Mapping[str, SafetensorsFile],
) -> None:
    listing = INDEX_NAME if (directory / INDEX_NAME).is_file() else SINGLE_NAME
    problems: list[str] = []
    for name, spec in specs.items():
        file = files.get(name)
        if file is None:
            problems.append(f"{name} is missing from {listing}")
            continue
        entry = file.entries[name]
        if entry.dtype not in _allowed_dtypes(spec, specs) or entry.shape != spec.shape:
            problems.append(
                f"{name} in {file.path.name} is {entry.dtype} {list(entry.shape)},"
                f" expected {spec.dtype} {list(spec.shape)}"
            )
    for name, file in files.items():
        if name not in specs and not _ignored(name, config):
            problems.append(f"{name} in {file.path.name} is unexpected")
    if problems:
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        raise CheckpointError(
            f"{directory}: {len(problems)} of {len(specs)} tensors do not fit the config: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


def _allowed_dtypes(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    allowed = _SAME_BYTES.get(spec.dtype, (spec.dtype,))
    if spec.dtype == "F8_E8M0":
        weight = specs[spec.name.removesuffix(".scale") + ".weight"]
        if weight.dtype == "F8_E4M3":
            # Base releases have been seen with the same power-of-two scales as float32.
            return (*allowed, "F32")
    return allowed


def _ignored(name: str, config: DeepSeekV4Config) -> bool:
    """Draft tensors of a release that this project has no use for."""
    if not name.startswith("mtp."):
        return False
    if config.dspark:
        return True
    number = name.split(".", 2)[1]
    return (
        number.isdecimal()
        and len(number) < 4
        and config.num_mtp_layers <= int(number) < config.num_nextn_predict_layers
    )


def _power_of_two_bytes(
    values: NDArray[np.float32], name: str, file: SafetensorsFile
) -> NDArray[np.uint8]:
    """Float32 powers of two as E8M0 bytes: both keep the exponent with a bias of 127."""
    bits = values.view(np.uint32)
    exponent = bits >> 23  # above 255 for a negative value
    if np.any(bits & 0x7FFFFF) or np.any(exponent < 1) or np.any(exponent > 254):
        raise CheckpointError(
            f"{file.path.name}: tensor {name} holds float32 scales that are not powers of two"
        )
    return exponent.astype(np.uint8)
