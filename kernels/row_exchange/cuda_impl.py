"""CUDA C++: every stream's rows in one launch each way; lists of rows in one launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.row_exchange.api import RowCopy, RowStream, stream_offsets

_SOURCE = Path(__file__).parent / "cuda" / "row_exchange.cu"
_MOST = 24  # lists of rows in one launch
_UNITS = (16, 8, 4, 2, 1)


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("from_", "to", "from_index", "to_index")),
        *((name, ctypes.c_int64) for name in ("from_stride", "to_stride", "rows", "first_block")),
        ("units", ctypes.c_uint32),
        ("unit", ctypes.c_int),
    ]


class _Segments(ctypes.Structure):
    _fields_ = [("list", _Segment * _MOST), ("count", ctypes.c_int)]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(_SOURCE)
    library.causeway_copy_rows.argtypes = (ctypes.POINTER(_Segments), ctypes.c_void_p)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def pack_rows(streams: tuple[RowStream, ...]) -> Tensor:
    """See ``kernels.row_exchange.api.pack_rows``."""
    offsets = stream_offsets(streams)
    packed = torch.empty(offsets[-1], dtype=torch.uint8, device=streams[0].local.device)
    rows = [stream.local.to(stream.dtype) for stream in streams]
    segments = [
        _rows(local, packed.data_ptr() + start, stream.row_bytes, stream.send)
        for stream, local, start in zip(streams, rows, offsets, strict=False)
    ]
    _copy(segments, packed)
    return packed


def unpack_rows(received: Tensor, streams: tuple[RowStream, ...]) -> tuple[Tensor, ...]:
    """See ``kernels.row_exchange.api.unpack_rows``."""
    offsets = stream_offsets(streams)
    rows = [stream.local.to(stream.dtype) for stream in streams]
    buffers = tuple(map(_buffer, streams, rows))
    segments: list[_Segment] = []
    for stream, local, buffer, start in zip(streams, rows, buffers, offsets, strict=False):
        if buffer is not local:
            source = received.data_ptr() + start
            segments += _parts(stream, local, buffer, source, offsets[-1])
    _copy(segments, received)
    return buffers


def copy_rows(copies: tuple[RowCopy, ...]) -> None:
    """See ``kernels.row_exchange.api.copy_rows``."""
    _copy([_copied(one) for one in copies], copies[0].source)


def _buffer(stream: RowStream, local: Tensor) -> Tensor:
    if stream.keep_local and stream.buffer_rows == local.shape[0]:
        return local
    return local.new_empty((stream.buffer_rows, local.shape[1]))


def _parts(
    stream: RowStream, local: Tensor, buffer: Tensor, source: int, rank_bytes: int
) -> Iterator[_Segment]:
    """Local rows, every rank's, carried ones: each behind the one before."""
    to, width = buffer.data_ptr(), stream.row_bytes
    if stream.keep_local:
        yield _rows(local, to, width, None)
        to += local.shape[0] * width
    for rank, count in enumerate(stream.counts):
        size = count * width
        yield _segment(source + rank * rank_bytes, size, to, size, 1, size, None)
        to += size
    if stream.carried is not None:
        yield _rows(stream.carried, to, width, stream.carried_index)


def _rows(rows: Tensor, to: int, width: int, index: Tensor | None) -> _Segment:
    count = (rows if index is None else index).shape[0]
    stride = rows.stride(0) * rows.element_size()
    if index is None and stride == width:
        return _segment(rows.data_ptr(), 0, to, 0, min(count, 1), count * width, None)
    return _segment(rows.data_ptr(), stride, to, width, count, width, index)


def _copied(one: RowCopy) -> _Segment:
    size = one.source.element_size()
    width, stride, to_stride = (
        n * size for n in (one.source.shape[1], one.source.stride(0), one.target.stride(0))
    )
    source, to = one.source.data_ptr(), one.target.data_ptr()
    if one.source_index is None and one.target_index is None and stride == to_stride == width:
        return _segment(source, 0, to, 0, min(one.reads, 1), one.reads * width, None)
    indices = one.source_index, one.target_index
    return _segment(source, stride, to, to_stride, one.reads, width, *indices)


def _segment(
    source: int,
    source_stride: int,
    to: int,
    to_stride: int,
    rows: int,
    row_bytes: int,
    from_index: Tensor | None,
    to_index: Tensor | None = None,
) -> _Segment:
    numbers = (source, source_stride, to, to_stride, row_bytes)
    unit = next(u for u in _UNITS if all(n % u == 0 for n in numbers))
    return _Segment(
        from_=source,
        to=to,
        from_index=None if from_index is None else from_index.data_ptr(),
        to_index=None if to_index is None else to_index.data_ptr(),
        from_stride=source_stride,
        to_stride=to_stride,
        rows=rows,
        units=row_bytes // unit,
        unit=unit,
    )


def _copy(segments: list[_Segment], on: Tensor) -> None:
    full = [s for s in segments if s.rows and s.units]
    for first in range(0, len(full), _MOST):
        some = full[first : first + _MOST]
        call = _Segments(count=len(some))
        call.list[: len(some)] = some
        code = _library().causeway_copy_rows(ctypes.byref(call), nvcc.stream(on))
        nvcc.check_launch("row_exchange", code)
