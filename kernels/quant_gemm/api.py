"""Products of rows that are FP8 already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.quant_rows.api import QuantRows

if TYPE_CHECKING:
    from kernels.grouped_gemm.api import PreparedExperts
    from kernels.linear.api import PreparedWeight

_FLOATS = (torch.float32, torch.bfloat16)


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """``linear(x, w, quantize=True, out_dtype=out_dtype)`` for the rows that ``x`` rounds to.

    Args:
        rows: [M, k] quantised rows; their ``col_offset`` is the weight's.
        w: an FP8 or FP4 weight with k columns.
        out_dtype: float32 or bfloat16.

    Returns:
        [M, n]. Per 128-column block the products are summed, scaled, and added in float32 in
        ascending order; one cast at the end.

    Raises:
        KernelContractError: a plain weight (it does not round activations), other columns or offset.
    """
    _check_product("linear_quant", rows, w)
    _check_out("linear_quant", out_dtype)
    out: Tensor = kernel("linear_quant", rows.device)(rows, w, out_dtype=out_dtype)
    return out


def linear_swiglu_quant(
    rows: QuantRows, w: PreparedWeight, *, limit: float, hidden_dtype: torch.dtype
) -> QuantRows:
    """``swiglu_quant`` of the two halves of ``linear_quant``: the first half of a feed-forward.

    Args:
        rows: [M, k] quantised rows; their ``col_offset`` is the weight's.
        w: an FP8 or FP4 weight [2 n, k]: the gate's rows, then the up's.
        limit: SwiGLU clamp, > 0.
        hidden_dtype: float32 or bfloat16, what the product and SwiGLU are rounded to.

    Returns:
        [M, n] quantised rows, bit for bit those of the two ops.
    """
    if w.out_features % 2:
        raise KernelContractError(
            f"linear_swiglu_quant: w: expected an even number of rows, got {w.out_features}"
        )
    _check_product("linear_swiglu_quant", rows, w)
    if not limit > 0:
        raise KernelContractError(f"linear_swiglu_quant: limit: expected a number > 0, got {limit}")
    _check_out("linear_swiglu_quant", hidden_dtype, "hidden_dtype")
    out: QuantRows = kernel("linear_swiglu_quant", rows.device)(
        rows, w, limit=limit, hidden_dtype=hidden_dtype
    )
    return out


def expert_ffn_quant(
    rows: QuantRows,
    offsets: Tensor,
    row_weight: Tensor,
    experts: PreparedExperts,
    *,
    limit: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """``expert_ffn(x, ..., quantize=True)`` for the rows that ``x`` rounds to.

    Args:
        rows: [N, D] quantised rows, sorted by local expert. Those from ``offsets[-1]`` on belong to
            nobody: they may hold anything, and cost no product.
        offsets: int64 [E_local + 1], ascending from 0 to at most N. On CUDA it is not read by the
            host and therefore not checked.
        row_weight: float32 [N].
        experts: FP8 or FP4 weights.
        limit: SwiGLU clamp, > 0.
        out_dtype: float32 or bfloat16; also the dtype of the products between the two GEMMs.

    Returns:
        [N, D] in ``out_dtype``; rows from ``offsets[-1]`` on are unspecified.
    """
    if rows.shape[1] != experts.hidden_size or rows.col_offset:
        raise KernelContractError(
            f"expert_ffn_quant: rows: expected {experts.hidden_size} columns at offset 0, got"
            f" {rows.shape[1]} at {rows.col_offset}"
        )
    shape = (experts.num_experts + 1,)
    check_tensor(
        "expert_ffn_quant: offsets", offsets, shape=shape, dtype=torch.int64, beside=rows.q
    )
    check_tensor(
        "expert_ffn_quant: row_weight",
        row_weight,
        shape=(rows.shape[0],),
        dtype=torch.float32,
        beside=rows.q,
    )
    if not limit > 0:
        raise KernelContractError(f"expert_ffn_quant: limit: expected a number > 0, got {limit}")
    _check_out("expert_ffn_quant", out_dtype)
    out: Tensor = kernel("expert_ffn_quant", rows.device)(
        rows, offsets, row_weight, experts, limit=limit, out_dtype=out_dtype
    )
    return out


def _check_product(op: str, rows: QuantRows, w: PreparedWeight) -> None:
    if not w.kind.rounds_activations:
        raise KernelContractError(f"{op}: w: expected an FP8 or FP4 weight, got a plain one")
    if (rows.shape[1], rows.col_offset) != (w.in_features, w.col_offset):
        raise KernelContractError(
            f"{op}: rows: expected {w.in_features} columns at offset {w.col_offset} as the"
            f" weight has, got {rows.shape[1]} at {rows.col_offset}"
        )


def _check_out(op: str, dtype: torch.dtype, name: str = "out_dtype") -> None:
    if dtype not in _FLOATS:
        raise KernelContractError(f"{op}: {name}: expected float32 or bfloat16, got {dtype}")
