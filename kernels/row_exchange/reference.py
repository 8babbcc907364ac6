"""Torch twins of ``pack_rows``, ``unpack_rows`` and ``copy_rows``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.row_exchange.api import RowCopy, RowStream, stream_offsets


def pack_rows(streams: tuple[RowStream, ...]) -> Tensor:
    """See ``kernels.row_exchange.api.pack_rows``."""
    offsets = stream_offsets(streams)
    packed = torch.zeros(offsets[-1], dtype=torch.uint8, device=streams[0].local.device)
    for stream, start in zip(streams, offsets, strict=False):
        rows = stream.local if stream.send is None else stream.local[stream.send]
        data = rows.to(stream.dtype).contiguous().view(-1).view(torch.uint8)
        packed[start : start + data.numel()] = data
    return packed


def unpack_rows(received: Tensor, streams: tuple[RowStream, ...]) -> tuple[Tensor, ...]:
    """See ``kernels.row_exchange.api.unpack_rows``."""
    offsets = stream_offsets(streams)
    buffers = []
    for stream, start in zip(streams, offsets, strict=False):
        width, dtype = stream.local.shape[1], stream.dtype
        parts = [stream.local.to(dtype)] if stream.keep_local else []
        if any(stream.counts):
            ranks = zip(received.view(len(stream.counts), -1), stream.counts, strict=True)
            data = [part[start : start + count * stream.row_bytes] for part, count in ranks]
            parts.append(torch.cat(data).view(dtype).view(-1, width))
        if stream.carried is not None and stream.carries:
            index = stream.carried_index
            parts.append(stream.carried if index is None else stream.carried[index])
        if not parts:
            parts.append(stream.local.new_empty(0, width, dtype=dtype))
        buffers.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return tuple(buffers)


def copy_rows(copies: tuple[RowCopy, ...]) -> None:
    """See ``kernels.row_exchange.api.copy_rows``."""
    for one in copies:
        rows = one.source if one.source_index is None else one.source[one.source_index]
        if one.target_index is None:
            one.target.copy_(rows)
        else:
            one.target[one.target_index] = rows
