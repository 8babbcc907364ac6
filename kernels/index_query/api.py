"""``index_query``: the indexer's query heads, rotated and rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.rope.api import check_rope_inputs

FP4_BLOCK = 32  # values per scale of an FP4-rounded index vector


def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, quantize: bool) -> Tensor:
    """RoPE on the last dims; with ``quantize`` then a Hadamard rotation and FP4 rounding of all dims.

    Without rounding the rotation would cancel in the scores, so it is left out.

    Args:
        q: float32 or bfloat16 [T, h, di].
        positions: int64 [T].
        inv_freq: float32 [r/2].
        quantize: Hadamard (scaled by di^-1/2), then FQ4 in blocks of 32.

    Returns:
        [T, h, di] in ``q.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device; with ``quantize``, di not a power of two >= 32.
    """
    check_tensor(
        "index_query: q", q, shape=(None, None, None), dtype=(torch.float32, torch.bfloat16)
    )
    check_rope_inputs("index_query", q, positions, inv_freq)
    check_index_dim("index_query", q.shape[-1], quantize)
    result: Tensor = kernel("index_query", q.device)(q, positions, inv_freq, quantize=quantize)
    return result


def check_index_dim(op: str, dim: int, quantize: bool) -> None:
    """Check that index vectors of ``dim`` values can be rotated and rounded.

    Raises:
        KernelContractError: they cannot.
    """
    if quantize and (dim < FP4_BLOCK or dim & (dim - 1)):
        raise KernelContractError(
            f"{op}: index head dim {dim} must be a power of two of at least {FP4_BLOCK}"
            " (Hadamard rotation, FP4 blocks)"
        )
