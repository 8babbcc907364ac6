"""``merge_lse``: one attention result out of partial ones over disjoint keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def merge_lse(o: Tensor, lse: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge P partial results by their log-sum-exp; the sink is added here, exactly once.

    Args:
        o: float32 or bfloat16 [P, T, H, d], each partial normalised without the sink.
        lse: float32 [P, T, H], natural log; -inf = that partial saw no key (its ``o`` is ignored).
        sink: float32 [H] logit that only enlarges the denominator, or None.

    Returns:
        ``(o, lse)``: [T, H, d] in ``o.dtype`` and float32 [T, H] without the sink. A row that no
        partial has keys for: o = 0, lse = -inf, also with a sink.

    Raises:
        KernelContractError: wrong shape, dtype or device; P = 0.
    """
    check_tensor(
        "merge_lse: o", o, shape=(None, None, None, None), dtype=(torch.float32, torch.bfloat16)
    )
    check_tensor("merge_lse: lse", lse, shape=tuple(o.shape[:3]), dtype=torch.float32, beside=o)
    if o.shape[0] == 0:
        raise KernelContractError("merge_lse: o holds 0 partials, allowed: 1 and above")
    if sink is not None:
        check_tensor("merge_lse: sink", sink, shape=(o.shape[2],), dtype=torch.float32, beside=o)
    merged: tuple[Tensor, Tensor] = kernel("merge_lse", o.device)(o, lse, sink)
    return merged
