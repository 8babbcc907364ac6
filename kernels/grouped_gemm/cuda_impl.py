"""CUDA: all experts of a layer in two grouped products of FP8 rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels.grouped_gemm import reference
from kernels.grouped_gemm.api import PreparedExperts
from kernels.grouped_gemm.device_experts import Fp8Experts
from kernels.linear.api import BLOCK, PreparedWeight, WeightKind, prepare_weight
from kernels.linear.device_weight import Fp8Weight
from kernels.quant_gemm.api import expert_ffn_quant
from kernels.quant_rows.api import quant_rows
from kernels.weight import BlockWeight

_ALIGN = 16  # columns of a weight that the copy engine can walk
_FLOATS = (torch.float32, torch.bfloat16)


def prepare_experts(
    w1: Sequence[BlockWeight], w3: Sequence[BlockWeight], w2: Sequence[BlockWeight]
) -> PreparedExperts:
    """See ``kernels.grouped_gemm.api.prepare_experts``.

    FP8 experts, and FP4 experts that FP8 holds without loss (proven per tensor), become two stacks;
    the given tensors are not kept. If one tensor cannot, the whole layer stays as single prepared
    weights, which ``expert_ffn`` walks one expert after the other.
    """
    inner, hidden = w1[0].data.shape[0], w2[0].data.shape[0]
    if inner % _ALIGN or hidden % _ALIGN or not inner or not hidden:
        return reference.prepare_experts(w1, w3, w2)
    stacks: _Stacks | None = None
    weights: tuple[list[Fp8Weight], list[Fp8Weight], list[Fp8Weight]] = ([], [], [])
    for expert, parts in enumerate(zip(w1, w3, w2, strict=True)):
        made = [prepare_weight(part) for part in parts]
        if not all(_fits(m, inner, hidden, i == 2) for i, m in enumerate(made)):
            return reference.prepare_experts(w1, w3, w2)
        if stacks is None:
            stacks = _Stacks(len(w1), inner, hidden, w1[0].data.device)
        views = stacks.put(expert, *(cast("Fp8Weight", m) for m in made))
        for kept, view in zip(weights, views, strict=True):
            kept.append(view)
    if stacks is None:
        return reference.prepare_experts(w1, w3, w2)
    gate, up, down = (cast("tuple[PreparedWeight, ...]", tuple(kept)) for kept in weights)
    return Fp8Experts(
        w1=gate,
        w3=up,
        w2=down,
        hidden_size=hidden,
        intermediate_size=inner,
        device=w1[0].data.device,
        w13=stacks.w13,
        w13_scale=stacks.w13_scale,
        w2_data=stacks.w2,
        w2_scale=stacks.w2_scale,
        up_row=stacks.up_row,
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
    """See ``kernels.grouped_gemm.api.expert_ffn``.

    The stacked form never reads ``offsets`` on the host, so it does not check them either.
    """
    if quantize and isinstance(experts, Fp8Experts) and rows.dtype in _FLOATS:
        return expert_ffn_quant(
            quant_rows(rows), offsets, row_weight, experts, limit=limit, out_dtype=rows.dtype
        )
    return reference.expert_ffn(rows, offsets, row_weight, experts, limit=limit, quantize=quantize)


def _fits(weight: object, inner: int, hidden: int, down: bool) -> bool:
    shape = (hidden, inner) if down else (inner, hidden)
    return (
        isinstance(weight, Fp8Weight)
        and (weight.out_features, weight.in_features) == shape
        and weight.row_offset == 0
        and weight.col_offset == 0
    )


class _Stacks:
    """The tensors being filled, expert by expert."""

    def __init__(self, experts: int, inner: int, hidden: int, device: torch.device) -> None:
        self.inner, self.hidden = inner, hidden
        self.up_row = -(-inner // BLOCK) * BLOCK
        lines, columns = self.up_row // BLOCK, -(-hidden // BLOCK)

        def codes(n: int, k: int) -> Tensor:
            return torch.zeros(experts, n, k, dtype=torch.uint8, device=device)

        self.w13 = codes(2 * self.up_row, hidden).view(torch.float8_e4m3fn)
        self.w13_scale = codes(2 * lines, columns)
        self.w2 = codes(hidden, inner).view(torch.float8_e4m3fn)
        self.w2_scale = codes(columns, lines)

    def put(
        self, expert: int, gate: Fp8Weight, up: Fp8Weight, down: Fp8Weight
    ) -> tuple[Fp8Weight, Fp8Weight, Fp8Weight]:
        """Copy one expert in; its three weights as views of the stacks."""
        lines, second = self.up_row // BLOCK, self.up_row
        data, scale = self.w13[expert], self.w13_scale[expert]
        views = (
            _view(data[: self.inner], scale[:lines], gate.kind),
            _view(data[second : second + self.inner], scale[lines:], up.kind),
            _view(self.w2[expert], self.w2_scale[expert], down.kind),
        )
        for view, weight in zip(views, (gate, up, down), strict=True):
            view.data.copy_(weight.data)
            view.scale.copy_(weight.scale)
        return views


def _view(data: Tensor, scale: Tensor, kind: WeightKind) -> Fp8Weight:
    return Fp8Weight(data=data, scale=scale, kind=kind)
