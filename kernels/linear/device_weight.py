"""Weights as the GPU keeps them: the checkpoint's own bytes, views of rows and columns included.

The classes offer what ``PreparedWeight`` offers to the readers of a prepared weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.linear.api import BLOCK, WeightKind
from kernels.linear.fp4_order import from_device_order
from kernels.quant.api import dequant_fp4, dequant_fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeviceWeight:
    """What they share: a value an element of ``data``, but for FP4."""

    data: Tensor

    @property
    def out_features(self) -> int:
        """Rows, n."""
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        """Columns, k."""
        return self.data.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.data.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight(_DeviceWeight):
    """An FP8 weight, or an FP4 one re-encoded without loss.

    Args:
        data: e4m3 [n, k].
        scale: E8M0 bytes of the 128x128 blocks that the slice touches.
        kind: the checkpoint's format.
        row_offset: rows of the first block before ``data``, 0..127.
        col_offset: likewise for columns; activation blocks are aligned by it.
        float_scale: the scales of a whole weight as float32, where an optional backend reads them.
    """

    scale: Tensor
    kind: WeightKind
    row_offset: int = 0
    col_offset: int = 0
    float_scale: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The float32 values [n, k], made anew at each call."""
        return dequant_fp8(self.data, self.scale, self.row_offset, self.col_offset)

    def rows(self, start: int, stop: int) -> Fp8Weight:
        """The rows ``start:stop`` as a view; no copy."""
        _check_range("rows", start, stop, self.out_features)
        first = self.row_offset + start
        last = -(-(self.row_offset + stop) // BLOCK)
        return Fp8Weight(
            data=self.data[start:stop],
            scale=self.scale[first // BLOCK : last],
            kind=self.kind,
            row_offset=first % BLOCK,
            col_offset=self.col_offset,
        )

    def cols(self, start: int, stop: int) -> Fp8Weight:
        """The columns ``start:stop`` as a view; no copy. Activation blocks stay where they were."""
        _check_range("cols", start, stop, self.in_features)
        first = self.col_offset + start
        last = -(-(self.col_offset + stop) // BLOCK)
        return Fp8Weight(
            data=self.data[:, start:stop],
            scale=self.scale[:, first // BLOCK : last],
            kind=self.kind,
            row_offset=self.row_offset,
            col_offset=first % BLOCK,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainWeight(_DeviceWeight):
    """A bfloat16 or float32 weight in its own dtype.

    Args:
        data: [n, k].
        row_offset: kept for ``rows`` and ``cols``, as in ``PreparedWeight``; means nothing here.
        col_offset: likewise.
    """

    row_offset: int = 0
    col_offset: int = 0

    @property
    def kind(self) -> WeightKind:
        """Always ``PLAIN``."""
        return WeightKind.PLAIN

    @property
    def matrix(self) -> Tensor:
        """The values [n, k] in the checkpoint's dtype."""
        return self.data

    def rows(self, start: int, stop: int) -> PlainWeight:
        """The rows ``start:stop`` as a view; no copy."""
        _check_range("rows", start, stop, self.out_features)
        return PlainWeight(
            data=self.data[start:stop],
            row_offset=(self.row_offset + start) % BLOCK,
            col_offset=self.col_offset,
        )

    def cols(self, start: int, stop: int) -> PlainWeight:
        """The columns ``start:stop`` as a view; no copy."""
        _check_range("cols", start, stop, self.in_features)
        return PlainWeight(
            data=self.data[:, start:stop],
            row_offset=self.row_offset,
            col_offset=(self.col_offset + start) % BLOCK,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4Weight(_DeviceWeight):
    """A packed FP4 weight; ``linear`` dequantises it at every call, grouped products read it.

    Args:
        data: int8 [n, k / 2] in the order of ``fp4_order``.
        scale: E8M0 bytes [n, k / 32].
    """

    scale: Tensor

    @property
    def kind(self) -> WeightKind:
        """Always ``FP4``."""
        return WeightKind.FP4

    @property
    def row_offset(self) -> int:
        """Always 0: no block spans rows."""
        return 0

    @property
    def col_offset(self) -> int:
        """Always 0: columns are not sliced."""
        return 0

    @property
    def matrix(self) -> Tensor:
        """The float32 values [n, k], made anew at each call."""
        return dequant_fp4(from_device_order(self.data), self.scale)

    @property
    def in_features(self) -> int:
        """Columns, k."""
        return 2 * self.data.shape[1]

    def rows(self, start: int, stop: int) -> Fp4Weight:
        """The rows ``start:stop`` as a view; no copy."""
        _check_range("rows", start, stop, self.out_features)
        return Fp4Weight(data=self.data[start:stop], scale=self.scale[start:stop])

    def cols(self, start: int, stop: int) -> Fp4Weight:
        """Not offered.

        Raises:
            KernelContractError: always; experts are never cut by columns.
        """
        raise KernelContractError(
            f"PreparedWeight.cols: a packed FP4 weight is not cut by columns, asked for {start}:{stop}"
        )


def _check_range(name: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise KernelContractError(
            f"PreparedWeight.{name}: expected 0 <= start <= stop <= {size}, got {start}:{stop}"
        )
