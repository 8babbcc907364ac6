"""Torch twins of ``moe_permute`` and ``moe_unpermute``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.moe_permute.api import PermutedRows


def moe_permute(
    x: Tensor, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedRows:
    """See ``kernels.moe_permute.api.moe_permute``."""
    local = (ids - first_expert).flatten()
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    order = local.argsort(stable=True)  # by expert, then token, then choice
    count = torch.bincount(local, minlength=num_local + 1)[:num_local]
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    place = place.masked_fill(local == num_local, -1)
    return PermutedRows(
        rows=x[order // max(ids.shape[1], 1)],
        offsets=offsets,
        row_weight=weights.flatten()[order],
        place=place.view_as(ids),
    )


def moe_unpermute(
    rows: Tensor, place: Tensor, shared: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See ``kernels.moe_permute.api.moe_unpermute``."""
    out = torch.zeros(place.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for choice in range(place.shape[1]):
        at = place[:, choice]
        here = at >= 0
        out[here] += rows[at[here]].float()
    if shared is not None:
        out += shared.float()
    return out.to(dtype)
