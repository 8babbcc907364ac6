"""Header of one safetensors file, checked in full before any tensor byte is read; mapped reads."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model.errors import CheckpointError

MAX_HEADER_BYTES: Final = 100_000_000
MAX_ENTRIES: Final = 1 << 18  # the largest official release has 145,116 tensors
_MAX_RANK: Final = 8
_MAX_DIM: Final = 1 << 48

# Every byte-sized dtype of the format, so that a wrong one is named and not called unknown.
FILE_DTYPE_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies: dtype name, shape, and its bytes ``start .. stop`` in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One checked file. Tensors are read through a memory map that opens on the first read.

    Args:
        path: the file; its name goes into every error.

    Raises:
        CheckpointError: unreadable, truncated, or any breach of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_header(path)
        self._map: mmap.mmap | None = None

    def read(
        self, name: str, rows: tuple[int, int] | None, cols: tuple[int, int] | None
    ) -> NDArray[np.uint8]:
        """The bytes of a tensor, or of a row and column range of it, as a new flat array.

        Ranges are inside the shape (the caller's plan is made from it). Only the pages of the range
        are touched for a row range; a column range copies row by row.
        """
        entry = self.entries[name]
        itemsize = FILE_DTYPE_BYTES[entry.dtype]
        if entry.start == entry.stop:
            return np.empty(0, dtype=np.uint8)
        raw = np.frombuffer(
            self._mapped(), dtype=np.uint8, count=entry.stop - entry.start, offset=entry.start
        )
        if entry.shape:
            table = raw.reshape(entry.shape[0], -1)
            if rows is not None:
                table = table[rows[0] : rows[1]]
            if cols is not None:
                width = math.prod(entry.shape[2:]) * itemsize
                table = table[:, cols[0] * width : cols[1] * width]
            raw = table
        return np.array(raw, copy=True).reshape(-1)

    def close(self) -> None:
        """Unmap the file; a later read maps it again."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as err:
                raise CheckpointError(f"{self.path.name}: cannot be mapped: {err}") from err
            needed = max(entry.stop for entry in self.entries.values())
            if len(self._map) < needed:
                self.close()
                raise CheckpointError(f"{self.path.name}: the file became shorter than {needed}")
        return self._map


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path.name}: {file_size} bytes are too few for a header")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path.name}: header of {length} bytes, allowed: {MAX_HEADER_BYTES}"
                )
            if 8 + length > file_size:
                raise CheckpointError(
                    f"{path.name}: header of {length} bytes does not fit a file of {file_size} bytes"
                )
            raw = file.read(length)
    except OSError as err:
        raise CheckpointError(f"{path.name}: cannot be read: {err.strerror}") from err
    if len(raw) != length:
        raise CheckpointError(f"{path.name}: header truncated")
    header = parse_json_object(raw, path.name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path.name}: __metadata__ must be an object")
    if len(header) > MAX_ENTRIES:
        raise CheckpointError(f"{path.name}: {len(header)} tensors, allowed: {MAX_ENTRIES}")
    data_start = 8 + length
    entries = {
        name: _entry(path.name, name, value, data_start, file_size)
        for name, value in header.items()
    }
    _check_layout(path.name, entries, data_start, file_size)
    return entries


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object in which no key appears twice.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, too deep, or a duplicate key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError(f"{where}: {_shown(key)} appears twice")
                seen.add(key)
        return made

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as err:
        raise CheckpointError(f"{where}: JSON nested too deeply") from err
    except ValueError as err:
        raise CheckpointError(f"{where}: not valid JSON: {err}") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _shown(name: str) -> str:
    """A name from a file as it goes into a message: quoted, escaped, and not endless."""
    return ascii(name if len(name) <= 120 else name[:117] + "...")


def _entry(where: str, name: str, value: object, data_start: int, file_size: int) -> TensorEntry:
    subject = f"{where}: tensor {_shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{subject}: must hold dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FILE_DTYPE_BYTES:
        shown = _shown(dtype) if isinstance(dtype, str) else type(dtype).__name__
        raise CheckpointError(f"{subject}: unknown dtype {shown}")
    if not _integers(shape) or len(shape) > _MAX_RANK or any(d >= _MAX_DIM for d in shape):
        raise CheckpointError(
            f"{subject}: shape must be at most {_MAX_RANK} integers in 0..2^48 - 1"
        )
    if not _integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{subject}: data_offsets must be two ascending integers")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > file_size:
        raise CheckpointError(
            f"{subject}: ends at byte {stop}, but the file has {file_size} (truncated?)"
        )
    needed = math.prod(shape) * FILE_DTYPE_BYTES[dtype]  # Python integers: no overflow
    if needed != stop - start:
        raise CheckpointError(
            f"{subject}: {dtype} {shape} takes {needed} bytes, data_offsets span {stop - start}"
        )
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=start, stop=stop)


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(
    where: str, entries: dict[str, TensorEntry], data_start: int, file_size: int
) -> None:
    """The format wants the data area used without overlaps, holes or bytes left over."""
    position, previous = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < position:
            raise CheckpointError(f"{where}: tensor {_shown(name)} overlaps {previous}")
        if entry.start > position:
            raise CheckpointError(
                f"{where}: {entry.start - position} unused bytes before tensor {_shown(name)}"
            )
        position, previous = entry.stop, f"tensor {_shown(name)}"
    if position != file_size:
        raise CheckpointError(
            f"{where}: {file_size - position} bytes after the last tensor belong to none"
        )
