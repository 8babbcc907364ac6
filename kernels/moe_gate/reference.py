"""Torch twin of the router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.numerics import widen

_EXP_BELOW = {torch.float32: -20.0, torch.float64: -40.0}  # exp(x/2) is exact enough below
_LOGIT_FLOOR = -160.0


def _scores(logits: Tensor) -> Tensor:
    """sqrt(softplus(logit)), without underflow; see ``moe_gate`` for the floor."""
    usual = F.softplus(logits, beta=1.0, threshold=20.0).sqrt()
    small = torch.exp(0.5 * logits.clamp(min=_LOGIT_FLOOR))
    return torch.where(logits < _EXP_BELOW[logits.dtype], small, usual)


def moe_gate(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    route_scale: float,
    bias: Tensor | None = None,
    tid2eid: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.moe_gate.api.moe_gate``."""
    wide = widen(x)
    scores = _scores(F.linear(wide, weight.to(wide.dtype)))
    if tid2eid is not None and token_ids is not None:
        ids = _hash_ids(tid2eid, token_ids, weight.shape[0])
    else:
        biased = scores if bias is None else scores + bias
        # A stable sort keeps the smaller expert first among equals; topk promises nothing.
        ids = biased.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids = ids.sort(-1).values
    chosen = scores.gather(1, ids)
    return ids, chosen / chosen.sum(-1, keepdim=True) * route_scale


def _hash_ids(tid2eid: Tensor, token_ids: Tensor, experts: int) -> Tensor:
    _check_range("token_ids", token_ids, tid2eid.shape[0])
    ids = tid2eid[token_ids].long()
    _check_range("tid2eid", ids, experts)
    return ids


def _check_range(name: str, values: Tensor, size: int) -> None:
    if values.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(values))
    if low < 0 or high >= size:
        raise KernelContractError(
            f"moe_gate: {name}: expected values in 0..{size - 1}, got {low if low < 0 else high}"
        )
