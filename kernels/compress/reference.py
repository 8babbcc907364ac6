"""Torch twin of ``compress``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.index_query.reference import hadamard
from kernels.kv_norm_rope.reference import round_nope
from kernels.quant.reference import fake_quant_fp4
from kernels.rms_norm.reference import rms_norm
from kernels.rope.reference import apply_rope

_NEG_INF = float("-inf")
_CHUNK = 1 << 22  # gathered gate values at once, so temporaries stay near 50 MB


def compress(
    rows: Tensor,
    row_index: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    *,
    ratio: int,
    index: bool,
    quantize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See ``kernels.compress.api.compress``."""
    if row_index.device.type == "cpu" and row_index.numel():
        last = int(row_index.max())
        if last >= rows.shape[0]:
            raise KernelContractError(
                f"compress: row_index {last} is outside rows, allowed: -1..{rows.shape[0] - 1}"
            )
    head_dim = norm_weight.shape[0]
    pooled = torch.empty(row_index.shape[0], head_dim, dtype=dtype, device=rows.device)
    wide = torch.float64 if torch.float64 in (rows.dtype, dtype) else torch.float32
    step = max(1, _CHUNK // (row_index.shape[1] * head_dim))
    for first in range(0, row_index.shape[0], step):
        part = slice(first, first + step)
        pooled[part] = _pool(rows, row_index[part], head_dim, ratio, wide).to(dtype)
    entries = apply_rope(rms_norm(pooled, norm_weight, eps), positions, inv_freq)
    if not quantize:
        return entries
    return fake_quant_fp4(hadamard(entries)) if index else round_nope(entries, 2 * inv_freq.numel())


def _pool(rows: Tensor, row_index: Tensor, head_dim: int, ratio: int, wide: torch.dtype) -> Tensor:
    """Pooled [E, d] in ``wide``: one softmax per channel over all slots of an entry."""
    width = rows.shape[1] // 2
    values, gates = [], []
    # Series s holds slots s*ratio.. of every entry and reads columns s*d.. of u and of g.
    for series in range(row_index.shape[1] // ratio):
        index = row_index[:, series * ratio : (series + 1) * ratio]
        column = series * head_dim
        missing = (index < 0)[..., None]
        if rows.shape[0] == 0:
            gathered = rows.new_zeros((*index.shape, 2, head_dim))
        else:
            safe = index.clamp(min=0)
            u = rows[:, column : column + head_dim][safe]
            g = rows[:, width + column : width + column + head_dim][safe]
            gathered = torch.stack((u, g), dim=2)
        values.append(gathered[:, :, 0].masked_fill(missing, 0.0))
        gates.append(gathered[:, :, 1].masked_fill(missing, _NEG_INF))
    u, g = torch.cat(values, dim=1).to(wide), torch.cat(gates, dim=1).to(wide)
    top = g.amax(dim=1, keepdim=True)
    weight = (g - top.masked_fill(top == _NEG_INF, 0.0)).exp()
    total = weight.sum(dim=1)
    return (weight * u).sum(dim=1) / total.masked_fill(total == 0, 1.0)
