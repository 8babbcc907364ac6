"""``pack_rows`` and ``unpack_rows``: several streams of rows travel between ranks as one buffer.
``copy_rows``: several lists of rows are copied at once.

``received = all_gather(pack_rows(streams)); buffers = unpack_rows(received, streams)``. The streams of
all ranks agree in order, counts, width and dtype; a rank's part of the buffer then has the same bytes
on every rank, stream after stream, each padded to the longest rank's rows and to 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel

_ALIGN = 16  # bytes; streams start at multiples of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStream:
    """One stream of rows of a rank.

    Args:
        local: this rank's rows [T, w]; any leading stride.
        counts: rows that each rank publishes.
        send: int64 [n], the local rows to publish; None: all of them, in order.
        carried: rows from before [M, w], or None. Its dtype is that of the buffer: local rows become
            it before they travel, so that a row is the same wherever it is read.
        carried_index: int64 [N], rows of ``carried`` to append; None: all.
        keep_local: whether the buffer starts with the local rows.
    """

    local: Tensor
    counts: tuple[int, ...]
    send: Tensor | None = None
    carried: Tensor | None = None
    carried_index: Tensor | None = None
    keep_local: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows that travel and of the buffer."""
        return self.local.dtype if self.carried is None else self.carried.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.local.shape[1] * self.dtype.itemsize

    @property
    def sent(self) -> int:
        """Rows that this rank publishes."""
        return self.local.shape[0] if self.send is None else self.send.shape[0]

    @property
    def carries(self) -> int:
        """Carried rows at the end of the buffer."""
        if self.carried is None:
            return 0
        return (self.carried if self.carried_index is None else self.carried_index).shape[0]

    @property
    def buffer_rows(self) -> int:
        """Rows of the buffer."""
        kept = self.local.shape[0] if self.keep_local else 0
        return kept + sum(self.counts) + self.carries


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCopy:
    """Rows on their way from one tensor to another.

    Args:
        source: rows [N, w]; any leading stride.
        target: rows [M, w] of the same dtype; any leading stride.
        source_index: int64 [n], the rows to read; None: all of them, in order.
        target_index: int64 [n], each distinct, where they go; None: to all rows, in order.
    """

    source: Tensor
    target: Tensor
    source_index: Tensor | None = None
    target_index: Tensor | None = None

    @property
    def reads(self) -> int:
        """Rows that are read."""
        return (self.source if self.source_index is None else self.source_index).shape[0]

    @property
    def writes(self) -> int:
        """Rows that are written: as many, or the copy is refused."""
        return (self.target if self.target_index is None else self.target_index).shape[0]


def stream_offsets(streams: tuple[RowStream, ...]) -> list[int]:
    """First byte of each stream in a rank's part of the buffer, then the part's size."""
    offsets = [0]
    for stream in streams:
        used = max(stream.counts) * stream.row_bytes
        offsets.append(offsets[-1] + -(-used // _ALIGN) * _ALIGN)
    return offsets


def pack_rows(streams: tuple[RowStream, ...]) -> Tensor:
    """The rows this rank publishes, as bytes.

    Returns:
        uint8 [stream_offsets(streams)[-1]]; bytes that pad shorter ranks hold anything.

    Raises:
        KernelContractError: wrong shape, dtype or device, or a number of rows that no rank publishes.
    """
    _check_streams("pack_rows", streams)
    packed: Tensor = kernel("pack_rows", streams[0].local.device)(streams)
    return packed


def unpack_rows(received: Tensor, streams: tuple[RowStream, ...]) -> tuple[Tensor, ...]:
    """Row buffers ``[local | rows of rank 0, rank 1, .. | carried]`` of every stream.

    Args:
        received: uint8 [ranks * stream_offsets(streams)[-1]], rank-major.
        streams: as given to ``pack_rows``.

    Returns:
        A tensor [stream.buffer_rows, w] of each stream's dtype; it may share memory with ``local`` or
        ``carried`` when it holds nothing else.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    _check_streams("unpack_rows", streams)
    device, size = streams[0].local.device, len(streams[0].counts)
    check_tensor(
        "unpack_rows: received",
        received,
        shape=(size * stream_offsets(streams)[-1],),
        dtype=torch.uint8,
        device=device,
    )
    buffers: tuple[Tensor, ...] = kernel("unpack_rows", device)(received, streams)
    return buffers


def copy_rows(copies: tuple[RowCopy, ...]) -> None:
    """Copy every list of rows. No list may write what one of them reads or writes.

    Raises:
        KernelContractError: wrong shape, dtype or device, or more or fewer rows than places; on the
            CPU also a row outside its tensor.
    """
    if not copies:
        return
    device = copies[0].source.device
    for one in copies:
        check_tensor("copy_rows: source", one.source, shape=(None, None), device=device)
        shape = (None, one.source.shape[1])
        check_tensor("copy_rows: target", one.target, shape=shape, device=device)
        if one.target.dtype is not one.source.dtype:
            raise KernelContractError(
                f"copy_rows: target: expected dtype {one.source.dtype}, got {one.target.dtype}"
            )
        for name, index in (("source", one.source_index), ("target", one.target_index)):
            if index is not None:
                check_tensor(
                    f"copy_rows: {name}_index",
                    index,
                    shape=(None,),
                    dtype=torch.int64,
                    device=device,
                )
        if one.reads != one.writes:
            raise KernelContractError(f"copy_rows: {one.reads} rows, but {one.writes} places")
    kernel("copy_rows", device)(copies)


def _check_streams(op: str, streams: tuple[RowStream, ...]) -> None:
    if not streams:
        raise KernelContractError(f"{op}: streams: expected one or more, got none")
    device, ranks = streams[0].local.device, len(streams[0].counts)
    for stream in streams:
        check_tensor(f"{op}: local", stream.local, shape=(None, None), device=device)
        width = stream.local.shape[1]
        if stream.carried is not None:
            check_tensor(f"{op}: carried", stream.carried, shape=(None, width), device=device)
        elif stream.carried_index is not None:
            raise KernelContractError(f"{op}: carried_index without carried rows")
        for name, index in (("send", stream.send), ("carried_index", stream.carried_index)):
            if index is not None:
                check_tensor(
                    f"{op}: {name}", index, shape=(None,), dtype=torch.int64, device=device
                )
        if not stream.counts or len(stream.counts) != ranks or min(stream.counts) < 0:
            raise KernelContractError(
                f"{op}: counts: expected {max(ranks, 1)} counts >= 0, got {stream.counts}"
            )
        if stream.sent not in stream.counts:
            raise KernelContractError(
                f"{op}: send: {stream.sent} rows, but the ranks publish {stream.counts}"
            )
