"""Routed rows as bytes: a row in either form, its routing weights and its experts travel as one piece."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from kernels import QuantRows, RowCopy, copy_rows

_ALIGN = 16  # bytes at which every part starts: what ``QuantRows`` promises of codes and scales

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
        ids: int64 [T, K].
        weights: float32 or float64 [T, K].

    Returns:
        uint8 [T, bytes of a row]; bytes between the parts hold anything.
    """
    forms = [rows.q, rows.scale] if isinstance(rows, QuantRows) else [rows]
    parts = [*forms, weights, ids]
    widths = [part.shape[1] * part.element_size() for part in parts]
    wire = torch.empty(
        ids.shape[0], sum(map(_padded, widths)), dtype=torch.uint8, device=ids.device
    )
    copies, at = [], 0
    for part, width in zip(parts, widths, strict=True):
        copies.append(RowCopy(source=part, target=wire[:, at : at + width].view(part.dtype)))
        at += _padded(width)
    copy_rows(tuple(copies))
    return wire


def unpack_routed(
    wire: Tensor, *, like: Tensor | QuantRows, weights_like: Tensor
) -> tuple[Tensor | QuantRows, Tensor, Tensor]:
    """Rows, ids and weights that ``pack_routed`` packed: views.

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
    return rows, part(choices, torch.int64), weights


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
