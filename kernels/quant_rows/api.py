"""Rows as FP8 codes with their scales: what ``linear`` rounds to, kept instead of thrown away.

A producer (RMSNorm, SwiGLU) that emits ``QuantRows`` saves every following product a pass over the
rows. The rounding is AQ of the spec: ``fake_quant_fp8`` with blocks of 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.quant.api import num_blocks
from kernels.quant_gemm.pieces import piece_height

BLOCK = 128  # columns of one scale
_ALIGN = 16  # bytes; rows of codes and of scales start at multiples of it
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRows:
    """Rows ``q * 2^(scale - 127)``.

    Args:
        q: e4m3 [M, k].
        scale: E8M0 bytes, uint8 [M, nblocks]; 255 stands for NaN (its codes are NaN as well).
        col_offset: columns of the first block that lie before the rows, 0..127.
        scale_columns: the scales once more as float32 [pieces, nblocks, height] for products that an
            optional backend serves in pieces of rows (``quant_gemm/pieces.py``); None where there is
            none, or whoever made the rows does not write them. Past the last row they are unwritten.

    Rows of ``q`` and of ``scale`` start at multiples of 16 bytes (the tensors are slices of padded
    ones; ``empty_quant_rows`` makes them).
    """

    q: Tensor
    scale: Tensor
    col_offset: int = 0
    scale_columns: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.q.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.q.shape[0], self.q.shape[1]

    def values(self) -> Tensor:
        """The rows as float32 [M, k], exact."""
        byte = self.scale.int()
        bits = (byte << 23).masked_fill(byte == 0, 0x00400000).masked_fill(byte == 255, 0x7FC00000)
        columns = torch.arange(self.q.shape[1], device=self.device) + self.col_offset
        return self.q.float() * bits.view(torch.float32)[:, columns // BLOCK]


def empty_quant_rows(
    rows: int,
    columns: int,
    device: torch.device,
    *,
    col_offset: int = 0,
    for_pieces: bool = False,
) -> QuantRows:
    """Unwritten rows in the layout that ``QuantRows`` promises.

    ``for_pieces``: whoever writes them also writes ``scale_columns`` where there are any.
    """
    blocks = num_blocks(columns, BLOCK, col_offset)
    q = torch.empty(rows, _padded(columns), dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(rows, _padded(blocks), dtype=torch.uint8, device=device)
    height = piece_height(rows, columns, device) if for_pieces and not col_offset else None
    floats = None
    if height is not None:
        floats = torch.empty(-(-rows // height), blocks, height, device=device)
    return QuantRows(
        q=q[:, :columns], scale=scale[:, :blocks], col_offset=col_offset, scale_columns=floats
    )


def columns_argument(rows: QuantRows) -> tuple[int | None, int]:
    """``scale_columns`` as kernels take them: address (or None) and the height's binary logarithm."""
    if rows.scale_columns is None:
        return None, 0
    return rows.scale_columns.data_ptr(), rows.scale_columns.shape[2].bit_length() - 1


def quant_rows(x: Tensor, *, amax: Tensor | None = None, col_offset: int = 0) -> QuantRows:
    """Round rows to FP8: the codes and scales of ``fake_quant_fp8(x, 128, amax, col_offset)``.

    Args:
        x: [M, k] float32 or bfloat16, any row stride.
        amax: float32 [M, nblocks] to use instead of the rows' own block maxima.
        col_offset: columns of the first 128-block before ``x[:, 0]``, 0..127.
    """
    check_tensor("quant_rows: x", x, shape=(None, None), dtype=_FLOATS)
    if not 0 <= col_offset < BLOCK:
        raise KernelContractError(f"quant_rows: col_offset: expected 0..127, got {col_offset}")
    if amax is not None:
        shape = (x.shape[0], num_blocks(x.shape[1], BLOCK, col_offset))
        check_tensor("quant_rows: amax", amax, shape=shape, dtype=torch.float32, beside=x)
    out: QuantRows = kernel("quant_rows", x.device)(x, amax=amax, col_offset=col_offset)
    return out


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, QuantRows]:
    """``rms_norm`` and the FP8 form of its result in one pass.

    Args:
        x: [M, k] float32 or bfloat16, any row stride.
        weight: [k] float32 or bfloat16.
        eps: added to the mean square.

    Returns:
        ``(normed, rows)``: [M, k] in ``x.dtype``, and ``quant_rows(normed)``.
    """
    check_tensor("rms_norm_quant: x", x, shape=(None, None), dtype=_FLOATS)
    check_tensor("rms_norm_quant: weight", weight, shape=(x.shape[1],), dtype=_FLOATS, beside=x)
    out: tuple[Tensor, QuantRows] = kernel("rms_norm_quant", x.device)(x, weight, eps)
    return out


def swiglu_quant(
    g: Tensor, u: Tensor, *, limit: float, row_weight: Tensor | None = None
) -> QuantRows:
    """The FP8 form of ``swiglu(g, u, limit=limit, row_weight=row_weight)``, which is not written.

    Args:
        g: gate [M, k], float32 or bfloat16; may be a column slice of a fused product.
        u: up [M, k], same dtype.
        limit: clamp, > 0.
        row_weight: float32 [M], multiplied before the cast to ``g.dtype``; None for none.
    """
    check_tensor("swiglu_quant: g", g, shape=(None, None), dtype=_FLOATS)
    check_tensor("swiglu_quant: u", u, shape=tuple(g.shape), dtype=g.dtype, beside=g)
    if not limit > 0:
        raise KernelContractError(f"swiglu_quant: limit: expected a number > 0, got {limit}")
    if row_weight is not None:
        check_tensor(
            "swiglu_quant: row_weight",
            row_weight,
            shape=(g.shape[0],),
            dtype=torch.float32,
            beside=g,
        )
    out: QuantRows = kernel("swiglu_quant", g.device)(g, u, limit=limit, row_weight=row_weight)
    return out


def _padded(size: int) -> int:
    return -(-max(size, 1) // _ALIGN) * _ALIGN
