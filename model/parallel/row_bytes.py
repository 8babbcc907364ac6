"""Routed rows as bytes: a row in either form, its routing weights and its experts travel as one piece."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from kernels import QuantRows

_ALIGN = 16  # bytes at which every part starts: what ``QuantRows`` promises of codes and scales
_IDS = torch.int32  # on the way

Rows = TypeVar("Rows", bound=Tensor | QuantRows)


def slice_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Rows ``start:stop``, as views."""
    part: Tensor | QuantRows
    if isinstance(rows, QuantRows):
        codes, scale = rows.q[start:stop], rows.scale[start:stop]
        part = QuantRows(q=codes, scale=scale, col_offset=rows.col_offset)
    else:
        part = rows[start:stop]
    return cast("Rows", part)


def pack_routed(rows: Tensor | QuantRows, ids: Tensor, weights: Tensor) -> Tensor:
    """Side by side, each padded to 16 bytes: rows (or codes, then scales), weights, ids.

    Args:
        rows: [T, D].
        ids: int64 [T, K], below 2^31.
        weights: float32 or float64 [T, K].

    Returns:
        uint8 [T, bytes of a row].
    """
    forms = [rows.q, rows.scale] if isinstance(rows, QuantRows) else [rows]
    return torch.cat([_as_bytes(part) for part in (*forms, weights, ids.to(_IDS))], dim=1)


def unpack_routed(
    wire: Tensor, *, like: Tensor | QuantRows, weights_like: Tensor
) -> tuple[Tensor | QuantRows, Tensor, Tensor]:
    """Rows, ids (int64) and weights that ``pack_routed`` packed; rows and weights are views.

    Args:
        like: rows of the same form and width; their number does not matter.
        weights_like: weights of the same dtype and number of choices.
    """
    at = 0

    def part(columns: int, dtype: torch.dtype) -> Tensor:
        nonlocal at
        start, at = at, at + _padded(columns * dtype.itemsize)
        return wire[:, start : start + columns * dtype.itemsize].view(dtype)

    rows: Tensor | QuantRows
    if isinstance(like, QuantRows):
        codes = part(like.shape[1], like.q.dtype)
        scale = part(like.scale.shape[1], like.scale.dtype)
        rows = QuantRows(q=codes, scale=scale, col_offset=like.col_offset)
    else:
        rows = part(like.shape[1], like.dtype)
    choices = weights_like.shape[1]
    weights = part(choices, weights_like.dtype)
    return rows, part(choices, _IDS).long(), weights


def _as_bytes(x: Tensor) -> Tensor:
    """[T, columns] -> uint8 [T, bytes of a row, padded]."""
    data = (x if x.shape[1] == 0 or x.stride(1) == 1 else x.contiguous()).view(torch.uint8)
    missing = _padded(data.shape[1]) - data.shape[1]
    return functional.pad(data, (0, missing)) if missing else data


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
