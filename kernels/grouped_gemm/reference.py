"""Torch twin of the routed experts: one expert after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.grouped_gemm.api import PreparedExperts
from kernels.linear.api import linear, prepare_weight
from kernels.swiglu.api import swiglu
from kernels.weight import BlockWeight


def prepare_experts(
    w1: Sequence[BlockWeight], w3: Sequence[BlockWeight], w2: Sequence[BlockWeight]
) -> PreparedExperts:
    """See ``kernels.grouped_gemm.api.prepare_experts``."""
    gates = tuple(prepare_weight(w) for w in w1)
    return PreparedExperts(
        w1=gates,
        w3=tuple(prepare_weight(w) for w in w3),
        w2=tuple(prepare_weight(w) for w in w2),
        hidden_size=gates[0].in_features,
        intermediate_size=gates[0].out_features,
        device=gates[0].device,
    )


def expert_ffn(
    rows: Tensor,
    offsets: Tensor,
    row_weight: Tensor,
    experts: PreparedExperts,
    *,
    limit: float,
    quantize: bool,
) -> Tensor:
    """See ``kernels.grouped_gemm.api.expert_ffn``."""
    bounds = offsets.tolist()
    ascending = all(a <= b for a, b in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != rows.shape[0] or not ascending:
        raise KernelContractError(
            f"expert_ffn: offsets: expected an ascending list from 0 to {rows.shape[0]},"
            f" got {bounds}"
        )
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        x = rows[start:stop]
        g = linear(x, experts.w1[expert], quantize=quantize)
        u = linear(x, experts.w3[expert], quantize=quantize)
        a = swiglu(g, u, limit=limit, row_weight=row_weight[start:stop])
        out[start:stop] = linear(a, experts.w2[expert], quantize=quantize)
    return out
