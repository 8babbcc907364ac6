"""Undo RoPE on the attention output, then the grouped first projection; plain or as FP8 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.linear.api import PreparedWeight
from kernels.quant_rows.api import QuantRows
from kernels.rope.api import check_rope_inputs


def grouped_output(
    o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: PreparedWeight, num_groups: int
) -> Tensor:
    """Inverse RoPE at the query position (result in ``o.dtype``), then ``o_g wo_a_g^T`` per group.

    Group g holds heads ``g * H/G ..`` and rows ``g * R ..`` of ``wo_a``. Activations are not
    quantised; the sum is f32, cast once.

    Args:
        o: float32 or bfloat16 [T, H, d].
        positions: int64 [T], positions of the queries.
        inv_freq: float32 [r/2].
        wo_a: [G * R, (H / G) * d].
        num_groups: G.

    Returns:
        [T, G * R] in ``o.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device; heads or rows that do not divide by G.
    """
    _check("grouped_output", o, positions, inv_freq, wo_a, num_groups)
    result: Tensor = kernel("grouped_output", o.device)(o, positions, inv_freq, wo_a, num_groups)
    return result


def grouped_output_quant(
    o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: PreparedWeight, num_groups: int
) -> QuantRows:
    """``quant_rows(grouped_output(...))``: what the FP8 product with ``wo_b`` reads.

    Args:
        o: as in ``grouped_output``, and likewise all others.
        positions: int64 [T].
        inv_freq: float32 [r/2].
        wo_a: [G * R, (H / G) * d].
        num_groups: G.

    Returns:
        [T, G * R], blocks of 128 columns from column 0 on.

    Raises:
        KernelContractError: as ``grouped_output``.
    """
    _check("grouped_output_quant", o, positions, inv_freq, wo_a, num_groups)
    result: QuantRows = kernel("grouped_output_quant", o.device)(
        o, positions, inv_freq, wo_a, num_groups
    )
    return result


def _check(
    op: str,
    o: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    wo_a: PreparedWeight,
    num_groups: int,
) -> None:
    check_tensor(f"{op}: o", o, shape=(None, None, None), dtype=(torch.float32, torch.bfloat16))
    check_rope_inputs(op, o, positions, inv_freq)
    _, heads, dim = o.shape
    rows = wo_a.out_features
    if num_groups < 1 or heads % num_groups or rows % num_groups:
        raise KernelContractError(
            f"{op}: num_groups {num_groups} must be >= 1 and divide {heads} heads"
            f" and {rows} rows of wo_a"
        )
    columns = heads // num_groups * dim
    if wo_a.in_features != columns or wo_a.device.type != o.device.type:
        raise KernelContractError(
            f"{op}: wo_a: expected shape [{rows}, {columns}] on {o.device}, got"
            f" [{rows}, {wo_a.in_features}] on {wo_a.device}"
        )
