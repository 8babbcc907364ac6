"""``x W^T`` with a weight (or a slice of one) in the checkpoint's format."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.quant.api import num_blocks
from kernels.weight import BlockWeight

BLOCK = 128  # rows and columns of an FP8 scale block, columns of an activation block
_FLOATS = (torch.float32, torch.bfloat16)


class WeightKind(enum.Enum):
    """The format a weight came in; it decides whether activations are rounded."""

    FP8 = "fp8"
    FP4 = "fp4"
    PLAIN = "plain"  # bf16 or float32 in the checkpoint

    @property
    def rounds_activations(self) -> bool:
        """Whether AQ(128) stands in front of the product when ``quantize`` is on."""
        return self is not WeightKind.PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWeight:
    """A weight as ``linear`` reads it: the dequantised float32 matrix (exact) and its origin.

    Args:
        matrix: float32 [n, k].
        kind: the checkpoint format.
        row_offset: rows of the first 128-block before ``matrix``, 0..127.
        col_offset: likewise for columns; activation blocks are aligned by it.
    """

    matrix: Tensor
    kind: WeightKind
    row_offset: int = 0
    col_offset: int = 0

    @property
    def out_features(self) -> int:
        """Rows, n."""
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        """Columns, k."""
        return self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.matrix.device

    def rows(self, start: int, stop: int) -> PreparedWeight:
        """The rows ``start:stop`` as a view; no copy."""
        _check_range("rows", start, stop, self.out_features)
        return PreparedWeight(
            matrix=self.matrix[start:stop],
            kind=self.kind,
            row_offset=(self.row_offset + start) % BLOCK,
            col_offset=self.col_offset,
        )

    def cols(self, start: int, stop: int) -> PreparedWeight:
        """The columns ``start:stop`` as a view; no copy. Activation blocks stay where they were."""
        _check_range("cols", start, stop, self.in_features)
        return PreparedWeight(
            matrix=self.matrix[:, start:stop],
            kind=self.kind,
            row_offset=self.row_offset,
            col_offset=(self.col_offset + start) % BLOCK,
        )


def _check_range(name: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise KernelContractError(
            f"PreparedWeight.{name}: expected 0 <= start <= stop <= {size}, got {start}:{stop}"
        )


def prepare_weight(weight: BlockWeight, *, dequantize: bool = False) -> PreparedWeight:
    """Bring a slice of a checkpoint weight into the form that ``linear`` reads.

    Args:
        weight: e4m3 with E8M0 128x128 scales, packed FP4 (int8) with E8M0 1x32 scales, bf16 or
            float32.
        dequantize: keep the values as a plain weight, which rounds no activations: for products
            that the model takes with unrounded rows (``grouped_output``). Nothing is lost.

    Raises:
        KernelContractError: a dtype, a scale shape or an offset that the format does not allow.
    """
    data, scale = weight.data, weight.scale
    allowed = (torch.float8_e4m3fn, torch.int8, *_FLOATS)
    check_tensor("prepare_weight: data", data, shape=(None, None), dtype=allowed)
    for name, offset in (("row_offset", weight.row_offset), ("col_offset", weight.col_offset)):
        if not 0 <= offset < BLOCK:
            raise KernelContractError(f"prepare_weight: {name}: expected 0..127, got {offset}")
    if (scale is None) != (data.dtype in _FLOATS):
        got = "no scale" if scale is None else f"a scale {list(scale.shape)}"
        raise KernelContractError(
            "prepare_weight: scale: expected one for e4m3 and int8 data, none for bf16 and"
            f" float32, got {got} with {str(data.dtype).removeprefix('torch.')}"
        )
    out: PreparedWeight = kernel("prepare_weight", data.device)(weight, dequantize=dequantize)
    return out


def linear(
    x: Tensor,
    w: PreparedWeight,
    *,
    quantize: bool,
    amax: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x W^T``, accumulated in float32 (float64 for float64 ``x``) and cast once.

    With ``quantize`` and an FP8 or FP4 weight, ``x`` is rounded first (AQ, blocks of 128 aligned to
    global columns). Plain weights never round activations. Float32 products never use TF32.

    Args:
        x: [.., k] float32 or bfloat16, any leading strides.
        w: the weight, k columns.
        quantize: the official rounding steps are on.
        amax: float32 [.., nblocks] block maxima to use instead of those of ``x``, for a slice that
            cuts a 128-block (see ``block_amax``); read only when ``x`` is rounded.
        out_dtype: float32, bfloat16 or float64; None for ``x.dtype``.

    Returns:
        [.., n] in ``out_dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    check_tensor("linear: x", x, dtype=_FLOATS, device=w.device)
    if x.dim() == 0 or x.shape[-1] != w.in_features:
        raise KernelContractError(
            f"linear: x: expected {w.in_features} columns as the weight has, got shape"
            f" {list(x.shape)}"
        )
    if amax is not None:
        blocks = num_blocks(w.in_features, BLOCK, w.col_offset)
        shape = (*x.shape[:-1], blocks)
        check_tensor("linear: amax", amax, shape=shape, dtype=torch.float32, beside=x)
    dtype = x.dtype if out_dtype is None else out_dtype
    if dtype not in (*_FLOATS, torch.float64):
        raise KernelContractError(
            f"linear: out_dtype: expected float32, bfloat16 or float64, got {dtype}"
        )
    out: Tensor = kernel("linear", x.device)(x, w, quantize=quantize, amax=amax, out_dtype=dtype)
    return out
