"""``moe_permute``, ``moe_permute_quant``, ``moe_unpermute``: rows by local expert, and added up again.

Nothing here needs a number from the device on the host: buffers have room for every routed row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.quant_rows.api import QuantRows

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutedRows:
    """Rows grouped by local expert, within an expert by (token, choice).

    Args:
        rows: [T * K, D]; rows from ``offsets[-1]`` on hold nothing that may be used.
        offsets: int64 [num_local + 1]; expert e owns rows offsets[e] .. offsets[e + 1].
        row_weight: float32 [T * K], likewise valid below ``offsets[-1]``.
        place: int64 [T, K], row of each (token, choice); -1 where the expert lives elsewhere.
    """

    rows: Tensor
    offsets: Tensor
    row_weight: Tensor
    place: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutedQuantRows:
    """``PermutedRows`` whose rows are in FP8."""

    rows: QuantRows
    offsets: Tensor
    row_weight: Tensor
    place: Tensor


def moe_permute(
    x: Tensor, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedRows:
    """Copy each row once per chosen expert that lives here, grouped by expert.

    Args:
        x: rows [T, D] float32 or bfloat16.
        ids: int64 [T, K], chosen experts.
        weights: float32 [T, K].
        first_expert: first expert of this rank, >= 0.
        num_local: experts of this rank, >= 1.

    Raises:
        KernelContractError: wrong shape, dtype, device or expert range.
    """
    check_tensor("moe_permute: x", x, shape=(None, None), dtype=_FLOATS)
    _check_routes("moe_permute", x, ids, weights, first_expert, num_local)
    out: PermutedRows = kernel("moe_permute", x.device)(
        x, ids, weights, first_expert=first_expert, num_local=num_local
    )
    return out


def moe_permute_quant(
    rows: QuantRows, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedQuantRows:
    """``moe_permute`` of rows that are FP8 already; codes and scales are copied as they are.

    Args:
        rows: [T, D] with ``col_offset`` 0.
        ids, weights, first_expert, num_local: as in ``moe_permute``.

    Raises:
        KernelContractError: wrong shape, dtype, device or expert range, or another ``col_offset``.
    """
    if rows.col_offset:
        raise KernelContractError(
            f"moe_permute_quant: rows: expected col_offset 0, got {rows.col_offset}"
        )
    _check_routes("moe_permute_quant", rows.q, ids, weights, first_expert, num_local)
    out: PermutedQuantRows = kernel("moe_permute_quant", rows.device)(
        rows, ids, weights, first_expert=first_expert, num_local=num_local
    )
    return out


def _check_routes(
    op: str, x: Tensor, ids: Tensor, weights: Tensor, first_expert: int, num_local: int
) -> None:
    check_tensor(f"{op}: ids", ids, shape=(x.shape[0], None), dtype=torch.int64, beside=x)
    check_tensor(
        f"{op}: weights",
        weights,
        shape=tuple(ids.shape),
        dtype=torch.float32,
        beside=x,
    )
    if first_expert < 0 or num_local < 1:
        raise KernelContractError(
            f"{op}: expected first_expert >= 0 and num_local >= 1, got {first_expert}"
            f" and {num_local}"
        )


def moe_unpermute(
    rows: Tensor, place: Tensor, shared: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Add up each token's rows, wide, in the order of its choices, then ``shared``.

    Args:
        rows: results [N, D] float32 or bfloat16, N > every place.
        place: int64 [T, K] of ``moe_permute``; -1 adds nothing.
        shared: [T, D] float32 or bfloat16, added last; None for none.
        dtype: of the result; sums are float32, and float64 for float64 rows.

    Returns:
        [T, D] in ``dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    check_tensor("moe_unpermute: rows", rows, shape=(None, None), dtype=_FLOATS)
    check_tensor("moe_unpermute: place", place, shape=(None, None), dtype=torch.int64, beside=rows)
    if shared is not None:
        shape = (place.shape[0], rows.shape[1])
        check_tensor("moe_unpermute: shared", shared, shape=shape, dtype=_FLOATS, beside=rows)
    if dtype not in (*_FLOATS, torch.float64):
        raise KernelContractError(
            f"moe_unpermute: dtype {dtype}, allowed: float32, bfloat16, float64"
        )
    out: Tensor = kernel("moe_unpermute", rows.device)(rows, place, shared, dtype)
    return out
