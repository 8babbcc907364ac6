"""Weights that read the same rows, stacked so that one product serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.linear.api import BLOCK, PreparedWeight, prepare_weight
from kernels.weight import BlockWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedWeight:
    """One weight made of several, and where each one's results lie.

    Args:
        weight: what ``linear`` and ``linear_quant`` read.
        columns: of each part, its columns in a result row; FP8 parts start at multiples of 128.
    """

    weight: PreparedWeight
    columns: tuple[slice, ...]

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of result rows [.., n], as views."""
        return [y[..., part] for part in self.columns]


def stack_weights(parts: Sequence[BlockWeight]) -> StackedWeight:
    """Stack whole weights of one format by their rows.

    FP8 parts are padded with zero rows to whole scale blocks; the columns that come of it belong to no
    part. (No part of an official checkpoint needs padding.)

    Args:
        parts: weights [n_i, k] of one dtype that start at row 0 of a scale block, with one
            ``col_offset``.

    Raises:
        KernelContractError: no part, or parts that do not fit together.
    """
    kinds = {(p.data.dtype, p.data.shape[1:], p.col_offset, p.scale is None) for p in parts}
    if len(kinds) != 1:
        raise KernelContractError(
            f"stack_weights: expected parts of one dtype, width and col_offset, got {sorted(map(str, kinds))}"
        )
    if any(p.row_offset for p in parts):
        offsets = [p.row_offset for p in parts]
        raise KernelContractError(
            f"stack_weights: row_offset: expected 0 everywhere, got {offsets}"
        )
    fp8 = parts[0].data.dtype == torch.float8_e4m3fn
    columns, data, scales, row = [], [], [], 0
    for i, part in enumerate(parts):
        n = part.data.shape[0]
        pad = -n % BLOCK if fp8 and i + 1 < len(parts) else 0
        columns.append(slice(row, row + n))
        data.append(part.data)
        if pad:
            data.append(part.data.new_zeros(pad, part.data.shape[1]))
        if part.scale is not None:
            scales.append(part.scale)
        row += n + pad
    whole = BlockWeight(
        _cat(data), torch.cat(scales) if scales else None, col_offset=parts[0].col_offset
    )
    return StackedWeight(weight=prepare_weight(whole), columns=tuple(columns))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` by rows, as bytes where torch has no kernel for the dtype."""
    if tensors[0].dtype == torch.float8_e4m3fn:
        return torch.cat([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)
    return torch.cat(list(tensors))
