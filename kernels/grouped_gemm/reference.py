"""Torch twin of the routed experts: products one expert after the other, the rest for all rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.grouped_gemm.api import PreparedExperts
from kernels.linear.api import PreparedWeight, prepare_weight
from kernels.linear.reference import round_activations
from kernels.swiglu.api import swiglu
from kernels.weight import BlockWeight


def prepare_experts(
    w1: Sequence[BlockWeight],
    w3: Sequence[BlockWeight],
    w2: Sequence[BlockWeight],
    *,
    keep_fp4: bool = False,
) -> PreparedExperts:
    """See ``kernels.grouped_gemm.api.prepare_experts``. ``keep_fp4`` changes nothing here."""
    del keep_fp4
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
    if bounds[0] != 0 or bounds[-1] > rows.shape[0] or not ascending:
        raise KernelContractError(
            f"expert_ffn: offsets: expected an ascending list from 0 to at most {rows.shape[0]},"
            f" got {bounds}"
        )
    if rows.shape[0] == 0:
        return rows.new_empty(rows.shape)
    # Every weight of a list has one format and covers whole rows, so the rounding of activations and
    # the SwiGLU, which see one row at a time, need no loop.
    x = round_activations(rows, experts.w1[0], quantize=quantize)
    g = _products(x, experts.w1, bounds).to(rows.dtype)
    u = _products(x, experts.w3, bounds).to(rows.dtype)
    a = swiglu(g, u, limit=limit, row_weight=row_weight)
    a = round_activations(a, experts.w2[0], quantize=quantize)
    return _products(a, experts.w2, bounds).to(rows.dtype)


def _products(x: Tensor, weights: Sequence[PreparedWeight], bounds: Sequence[int]) -> Tensor:
    out = x.new_zeros(x.shape[0], weights[0].out_features)
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            matrix = weights[expert].matrix.to(x.dtype)
            torch.mm(x[start:stop], matrix.T, out=out[start:stop])
    return out
