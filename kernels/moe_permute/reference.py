"""Torch twins of ``moe_permute``, ``moe_permute_quant`` and ``moe_unpermute``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.moe_permute.api import PermutedQuantRows, PermutedRows
from kernels.numerics import wide_dtype
from kernels.quant_rows.api import QuantRows, empty_quant_rows


def moe_permute(
    x: Tensor, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedRows:
    """See ``kernels.moe_permute.api.moe_permute``."""
    order, offsets, place = _routes(ids, first_expert, num_local)
    return PermutedRows(
        rows=x[order // max(ids.shape[1], 1)],
        offsets=offsets,
        row_weight=weights.flatten()[order],
        place=place,
    )


def moe_permute_quant(
    rows: QuantRows, ids: Tensor, weights: Tensor, *, first_expert: int, num_local: int
) -> PermutedQuantRows:
    """See ``kernels.moe_permute.api.moe_permute_quant``."""
    order, offsets, place = _routes(ids, first_expert, num_local)
    token = order // max(ids.shape[1], 1)
    moved = empty_quant_rows(order.numel(), rows.shape[1], rows.device)
    moved.q.view(torch.uint8).copy_(rows.q.view(torch.uint8)[token])
    moved.scale.copy_(rows.scale[token])
    return PermutedQuantRows(
        rows=moved, offsets=offsets, row_weight=weights.flatten()[order], place=place
    )


def _routes(ids: Tensor, first_expert: int, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the (token, choice) pairs, offsets of the local experts, place of each pair."""
    local = (ids - first_expert).flatten()
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    order = local.argsort(stable=True)  # by expert, then token, then choice
    count = torch.bincount(local, minlength=num_local + 1)[:num_local]
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    place = place.masked_fill(local == num_local, -1)
    return order, offsets, place.view_as(ids)


def moe_unpermute(
    rows: Tensor, place: Tensor, shared: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See ``kernels.moe_permute.api.moe_unpermute``."""
    wide = wide_dtype(rows.dtype)
    out = torch.zeros(place.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for choice in range(place.shape[1]):
        at = place[:, choice]
        here = at >= 0
        out[here] += rows[at[here]].to(wide)
    if shared is not None:
        out += shared.to(wide)
    return out.to(dtype)
