"""Public quantisation ops: fake rounding of activations, and weights to and from their formats.

Scales are powers of two. As bytes (uint8, E8M0) ``b`` stands for ``2^(b - 127)``, 255 for NaN.
The official steps round float32 values: float64 input becomes float32 first, and what is rounded
comes back, exactly, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel

_FLOATS = (torch.float32, torch.bfloat16)
_FP4_BLOCK = 32
_WEIGHT_BLOCK = 128


def num_blocks(columns: int, block: int, col_offset: int = 0) -> int:
    """Blocks of ``block`` columns that ``columns`` columns from ``col_offset`` on touch."""
    return -(-(col_offset % block + columns) // block)


def block_amax(x: Tensor, block: int, col_offset: int = 0) -> Tensor:
    """Largest magnitude of each block of columns.

    Args:
        x: [.., k] float32 or bfloat16.
        block: columns per block.
        col_offset: global column of ``x[.., 0]``; blocks start at global multiples of ``block``.

    Returns:
        float32 [.., nblocks], one value per global block that the columns touch. NaN propagates.

    Raises:
        KernelContractError: wrong shape or dtype, or a block or offset out of range.
    """
    _check_blocks("block_amax", x, block, col_offset)
    out: Tensor = kernel("block_amax", x.device)(x, block, col_offset)
    return out


def fake_quant_fp8(
    x: Tensor, block: int, amax: Tensor | None = None, col_offset: int = 0
) -> Tensor:
    """Round to e4m3 and back with one power-of-two scale per row and block of columns.

    ``s = 2^ceil(log2(max(amax, 1e-4) / 448))``; values are ``e4m3(clamp(x / s, -448, 448)) * s``,
    ties to even. Both official rounding steps are this op: AQ with block 128, FQ8 with block 64.

    Args:
        x: [.., k] float32 or bfloat16; k need not be a multiple of ``block``.
        block: columns per scale.
        amax: float32 [.., nblocks] to use instead of ``block_amax(x, block, col_offset)``, for a
            slice that holds only a part of a block.
        col_offset: global column of ``x[.., 0]``.

    Returns:
        [.., k] in ``x.dtype`` (exact in either). A NaN in a block makes the block NaN.

    Raises:
        KernelContractError: wrong shape, dtype or device, or a block or offset out of range.
    """
    _check_blocks("fake_quant_fp8", x, block, col_offset)
    if amax is not None:
        shape = (*x.shape[:-1], num_blocks(x.shape[-1], block, col_offset))
        check_tensor("fake_quant_fp8: amax", amax, shape=shape, dtype=torch.float32, beside=x)
    out: Tensor = kernel("fake_quant_fp8", x.device)(x, block, amax, col_offset)
    return out


def fake_quant_fp4(x: Tensor) -> Tensor:
    """Round to FP4 (e2m1) and back, one power-of-two scale per row and 32 columns (FQ4).

    ``s = 2^ceil(log2(max(amax, 6 * 2^-126) / 6))``, ties to the even mantissa.

    Args:
        x: [.., k] float32 or bfloat16, k a multiple of 32.

    Returns:
        [.., k] in ``x.dtype``. A NaN in a block makes the block NaN.

    Raises:
        KernelContractError: wrong shape or dtype, or k no multiple of 32.
    """
    _check_fp4_columns("fake_quant_fp4", x)
    out: Tensor = kernel("fake_quant_fp4", x.device)(x)
    return out


def act_quant(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """FP8 codes and scales of activations: the stored form of ``fake_quant_fp8``.

    Args:
        x: [.., k] float32 or bfloat16.
        block: columns per scale.

    Returns:
        ``(q, s)``: e4m3 [.., k] and float32 powers of two [.., ceil(k / block)].

    Raises:
        KernelContractError: wrong shape or dtype, or ``block`` < 1.
    """
    _check_blocks("act_quant", x, block, 0)
    out: tuple[Tensor, Tensor] = kernel("act_quant", x.device)(x, block)
    return out


def dequant_fp8(data: Tensor, scale_u8: Tensor, row_offset: int = 0, col_offset: int = 0) -> Tensor:
    """Values of an FP8 weight slice, exact.

    Args:
        data: e4m3 [n, k].
        scale_u8: E8M0 bytes of the 128x128 blocks that the slice touches.
        row_offset: rows of the first block before the slice, 0..127.
        col_offset: columns of the first block before the slice, 0..127.

    Returns:
        float32 [n, k].

    Raises:
        KernelContractError: wrong shape, dtype or device, or an offset out of range.
    """
    check_tensor("dequant_fp8: data", data, shape=(None, None), dtype=torch.float8_e4m3fn)
    for name, offset in (("row_offset", row_offset), ("col_offset", col_offset)):
        if not 0 <= offset < _WEIGHT_BLOCK:
            raise KernelContractError(f"dequant_fp8: {name}: expected 0..127, got {offset}")
    rows = num_blocks(data.shape[0], _WEIGHT_BLOCK, row_offset)
    cols = num_blocks(data.shape[1], _WEIGHT_BLOCK, col_offset)
    check_tensor(
        "dequant_fp8: scale_u8",
        scale_u8,
        shape=(rows, cols),
        dtype=torch.uint8,
        beside=data,
    )
    out: Tensor = kernel("dequant_fp8", data.device)(data, scale_u8, row_offset, col_offset)
    return out


def dequant_fp4(packed: Tensor, scale_u8: Tensor) -> Tensor:
    """Values of a packed FP4 weight, exact. The low nibble is the even column.

    Args:
        packed: int8 (or uint8) [n, k / 2], k a multiple of 32.
        scale_u8: E8M0 bytes [n, k / 32].

    Returns:
        float32 [n, k].

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    check_tensor("dequant_fp4: packed", packed, shape=(None, None), dtype=(torch.int8, torch.uint8))
    if packed.shape[1] % (_FP4_BLOCK // 2):
        raise KernelContractError(
            f"dequant_fp4: packed: expected columns in multiples of 16, got {packed.shape[1]}"
        )
    check_tensor(
        "dequant_fp4: scale_u8",
        scale_u8,
        shape=(packed.shape[0], packed.shape[1] // (_FP4_BLOCK // 2)),
        dtype=torch.uint8,
        beside=packed,
    )
    out: Tensor = kernel("dequant_fp4", packed.device)(packed, scale_u8)
    return out


def pack_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pack values as FP4 with the rule of ``fake_quant_fp4``.

    Args:
        x: [.., k] float32 or bfloat16, finite, k a multiple of 32.

    Returns:
        ``(packed, scale)``: int8 [.., k / 2] (low nibble = even column), E8M0 bytes [.., k / 32].

    Raises:
        KernelContractError: wrong shape or dtype, or k no multiple of 32.
    """
    _check_fp4_columns("pack_fp4", x)
    out: tuple[Tensor, Tensor] = kernel("pack_fp4", x.device)(x)
    return out


def quant_fp8_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight to the release format: the rule of ``fake_quant_fp8`` per 128x128 block.

    Args:
        w: [n, k] float32 or bfloat16.

    Returns:
        ``(data, scale)``: e4m3 [n, k] and E8M0 bytes [ceil(n / 128), ceil(k / 128)].

    Raises:
        KernelContractError: wrong shape or dtype.
    """
    check_tensor("quant_fp8_weight: w", w, shape=(None, None), dtype=_FLOATS)
    out: tuple[Tensor, Tensor] = kernel("quant_fp8_weight", w.device)(w)
    return out


def _check_blocks(op: str, x: Tensor, block: int, col_offset: int) -> None:
    check_tensor(f"{op}: x", x, dtype=_FLOATS)
    if x.dim() == 0:
        raise KernelContractError(f"{op}: x: expected at least one dimension, got a scalar")
    if block < 1 or col_offset < 0:
        raise KernelContractError(
            f"{op}: expected block >= 1 and col_offset >= 0, got {block} and {col_offset}"
        )


def _check_fp4_columns(op: str, x: Tensor) -> None:
    check_tensor(f"{op}: x", x, dtype=_FLOATS)
    if x.dim() == 0 or x.shape[-1] % _FP4_BLOCK:
        raise KernelContractError(
            f"{op}: x: expected a last dimension in multiples of {_FP4_BLOCK}, got {list(x.shape)}"
        )
