"""Rows in either form as one tensor that can travel: FP8 codes and their scales side by side."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from kernels import QuantRows

_ALIGN = 16  # bytes at which codes and scales of a row start, as ``QuantRows`` promises

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


def rows_to_wire(rows: Tensor | QuantRows) -> Tensor:
    """[T, ..]: plain rows as they are, FP8 rows as uint8 ``[codes | padding | scales | padding]``."""
    if isinstance(rows, Tensor):
        return rows
    codes, scales = rows.shape[1], rows.scale.shape[1]
    first, width = _layout(codes, scales)
    wire = torch.zeros(rows.shape[0], width, dtype=torch.uint8, device=rows.device)
    wire[:, :codes] = rows.q.view(torch.uint8)
    wire[:, first : first + scales] = rows.scale
    return wire


def rows_from_wire(wire: Tensor, *, like: Tensor | QuantRows) -> Tensor | QuantRows:
    """What ``rows_to_wire`` packed, as views.

    Args:
        like: rows of the same form and width; their number does not matter.
    """
    if isinstance(like, Tensor):
        return wire
    codes, scales = like.shape[1], like.scale.shape[1]
    first, _ = _layout(codes, scales)
    return QuantRows(
        q=wire[:, :codes].view(torch.float8_e4m3fn),
        scale=wire[:, first : first + scales],
        col_offset=like.col_offset,
    )


def _layout(codes: int, scales: int) -> tuple[int, int]:
    """Where the scales start, and the bytes of a row."""
    first = -(-codes // _ALIGN) * _ALIGN
    return first, first + -(-scales // _ALIGN) * _ALIGN
