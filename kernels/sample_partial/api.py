"""``sample_partial`` and ``merge_samples``: Gumbel-max over a vocabulary that ranks share.

Each rank finds the best token of its columns; ranks exchange three numbers per row and take the best.
The token is that of the whole row: the noise is keyed by the global id, and a score has the same bits
wherever it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSample:
    """The best token of some columns of every row.

    Args:
        score: float32 [N], what tokens compete by: the plain logit of a greedy row, else
            ``(logit - peak) / temperature + noise``; -inf where no logit is above -inf.
        ids: int64 [N], global id; ties go to the smaller one.
        lse: float32 [N], log-sum-exp of the plain logits.
    """

    score: Tensor
    ids: Tensor
    lse: Tensor


def sample_partial(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    vocab_offset: int,
    vocab_size: int,
    peak: Tensor | None = None,
) -> PartialSample:
    """The best token of each row among these columns, without writing noise.

    Args:
        logits: float32 [N, V], columns ``vocab_offset ..`` of the vocabulary.
        temperature: float32 [N]; <= 0: greedy. Below 1e-30 it counts as 1e-30.
        seeds, steps: int64 [N], key of each row's noise (``gumbel_noise``); any value for greedy rows.
        vocab_offset: global id of the first column.
        vocab_size: ids from here on are padding and never chosen; at least one column is below it.
        peak: float32 [N], the largest logit of the whole row, over all ranks (scores count down from
            it). None: these columns are the whole row.

    Returns:
        Score, id and lse. A row with NaN, +inf, or whose peak is -inf has an lse that is not finite,
        also after the merge; its score and id mean nothing.

    Raises:
        KernelContractError: wrong shape, dtype or device, or no column below ``vocab_size``.
    """
    rows = (logits.shape[0],)
    device = logits.device
    _check_float32("logits", logits, (None, None), device)
    _check_float32("temperature", temperature, rows, device)
    if peak is not None:
        _check_float32("peak", peak, rows, device)
    for name, value in (("seeds", seeds), ("steps", steps)):
        check_tensor(f"sample_partial: {name}", value, shape=rows, dtype=torch.int64, device=device)
    if not 0 <= vocab_offset < vocab_size or logits.shape[1] == 0:
        raise KernelContractError(
            f"sample_partial: {logits.shape[1]} columns from id {vocab_offset} on, none below"
            f" vocab_size {vocab_size}"
        )
    part: PartialSample = kernel("sample_partial", device)(
        logits,
        temperature,
        seeds,
        steps,
        vocab_offset=vocab_offset,
        vocab_size=vocab_size,
        peak=peak,
    )
    return part


def merge_samples(score: Tensor, ids: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The best token of each row over ranks, and the log-sum-exp of the whole row.

    Args:
        score: float32 [R, N] of R ranks whose columns ascend.
        ids: int64 [R, N].
        lse: float32 [R, N].

    Returns:
        ids int64 [N] (ties to the smaller) and lse float32 [N]; an lse that is not finite names a row
        that cannot be sampled from.

    Raises:
        KernelContractError: wrong shape, dtype or device.
    """
    shape = tuple(score.shape)
    check_tensor("merge_samples: score", score, shape=(None, None), dtype=torch.float32)
    check_tensor("merge_samples: ids", ids, shape=shape, dtype=torch.int64, beside=score)
    check_tensor("merge_samples: lse", lse, shape=shape, dtype=score.dtype, beside=score)
    merged: tuple[Tensor, Tensor] = kernel("merge_samples", score.device)(score, ids, lse)
    return merged


def _check_float32(
    name: str, value: Tensor, shape: tuple[int | None, ...], device: torch.device
) -> None:
    check_tensor(f"sample_partial: {name}", value, shape=shape, device=device)
    if value.dtype is not torch.float32:
        raise KernelContractError(
            f"sample_partial: {name}: expected float32, got {str(value.dtype).removeprefix('torch.')}"
        )
