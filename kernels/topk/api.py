"""Deterministic selection: ``topk_select`` over score rows, ``topk_merge`` over candidate pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def topk_select(
    scores: Tensor, k: int, row_start: Tensor | None = None, row_end: Tensor | None = None
) -> Tensor:
    """Indices of the ``k`` best columns of each row.

    Ties go to the smaller index (-0.0 equals 0.0); NaN and -inf are never selected. A row with fewer
    than ``k`` candidates is filled with -1.

    Args:
        scores: float32 [T, M] with any row stride (padded, sliced, offset rows).
        k: any number >= 0, also above M.
        row_start: int64 [T], first column of each row's candidates; None = 0.
        row_end: int64 [T], one past the last; None = M. Ends below the start mean no candidate.

    Returns:
        int32 [T, k]: row-local indices (column minus ``row_start``), ascending, -1 last.

    Raises:
        KernelContractError: wrong shape, dtype or device; negative k.
    """
    check_tensor("topk_select: scores", scores, shape=(None, None), dtype=torch.float32)
    _check_k("topk_select", k)
    for name, bound in (("row_start", row_start), ("row_end", row_end)):
        if bound is not None:
            check_tensor(
                f"topk_select: {name}",
                bound,
                shape=(scores.shape[0],),
                dtype=torch.int64,
                beside=scores,
            )
    result: Tensor = kernel("topk_select", scores.device)(scores, k, row_start, row_end)
    return result


def topk_merge(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """The ``k`` best of candidate pairs (value, index), by the rules of ``topk_select``.

    Args:
        values: float32 [T, M].
        indices: int32 [T, M] in any order, distinct within a row; -1 = no candidate.
        k: any number >= 0.

    Returns:
        int32 [T, k]: the chosen indices, ascending, -1 last.

    Raises:
        KernelContractError: wrong shape, dtype or device; negative k.
    """
    check_tensor("topk_merge: values", values, shape=(None, None), dtype=torch.float32)
    check_tensor(
        "topk_merge: indices",
        indices,
        shape=tuple(values.shape),
        dtype=torch.int32,
        beside=values,
    )
    _check_k("topk_merge", k)
    result: Tensor = kernel("topk_merge", values.device)(values, indices, k)
    return result


def _check_k(op: str, k: int) -> None:
    if k < 0:
        raise KernelContractError(f"{op}: k = {k}, allowed: 0 and above")
