"""CUDA: all experts of a layer in two grouped products of FP8 rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels.grouped_gemm import reference
from kernels.grouped_gemm.api import PreparedExperts
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.linear.api import BLOCK, PreparedWeight, prepare_weight
from kernels.linear.device_weight import Fp4Weight, Fp8Weight
from kernels.linear.fp4_order import COLUMNS as SUB_BLOCK
from kernels.linear.fp4_order import to_device_order
from kernels.quant_gemm.api import expert_ffn_quant
from kernels.quant_rows.api import quant_rows
from kernels.weight import BlockWeight

_ALIGN = 16  # columns of a weight that the copy engine can walk
# Of a 1x32 scale to its 128x128 one: below, a code of FP8 is exact only if it is zero.
_LOWEST_SHIFT = -11
_FLOATS = (torch.float32, torch.bfloat16)


def prepare_experts(
    w1: Sequence[BlockWeight],
    w3: Sequence[BlockWeight],
    w2: Sequence[BlockWeight],
    *,
    keep_fp4: bool = False,
) -> PreparedExperts:
    """See ``kernels.grouped_gemm.api.prepare_experts``.

    FP8 experts, and FP4 experts that FP8 holds without loss (proven per tensor), become two stacks;
    the given tensors are not kept. If one tensor cannot, the whole layer stays as single prepared
    weights, which ``expert_ffn`` walks one expert after the other.
    """
    inner, hidden = w1[0].data.shape[0], w2[0].data.shape[0]
    if inner % _ALIGN or hidden % _ALIGN or not inner or not hidden:
        return reference.prepare_experts(w1, w3, w2)
    packed = keep_fp4 and all(w.data.dtype == torch.int8 for w in (*w1, *w3, *w2))
    stacks = _Stacks(len(w1), inner, hidden, packed, w1[0].data.device)
    views: list[tuple[PreparedWeight, ...]] = []
    for expert, parts in enumerate(zip(w1, w3, w2, strict=True)):
        made = [prepare_weight(part) for part in parts]
        codes = [m for i, m in enumerate(made) if _fits(m, inner, hidden, i == 2)]
        if len(codes) != len(made):
            return reference.prepare_experts(w1, w3, w2)
        views.append(stacks.put(expert, cast("list[Fp8Weight]", codes), parts))
    gate, up, down = zip(*views, strict=True)
    return stacks.experts(gate, up, down)


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

    The stacked forms never read ``offsets`` on the host, so they do not check them either.
    """
    if quantize and isinstance(experts, Fp8Experts | Fp4Experts) and rows.dtype in _FLOATS:
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


def _readable_scales(sub: Tensor, scale: Tensor) -> Tensor:
    """1x32 scales whose distance to the 128x128 ones is in the kernel's table.

    Others belong to blocks of zeros alone, since FP8 holds every value: any scale will do for them.
    """
    n, columns = sub.shape
    lines = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK // SUB_BLOCK, 1)
    lines = lines[:, :columns]
    return torch.where(sub.int() - lines.int() < _LOWEST_SHIFT, lines, sub)


class _Stacks:
    """The tensors being filled, expert by expert."""

    def __init__(
        self, experts: int, inner: int, hidden: int, packed: bool, device: torch.device
    ) -> None:
        self.inner, self.hidden, self.packed, self.device = inner, hidden, packed, device
        self.up_row = -(-inner // BLOCK) * BLOCK
        lines, columns = self.up_row // BLOCK, -(-hidden // BLOCK)

        def stack(n: int, k: int) -> Tensor:
            return torch.zeros(experts, n, k, dtype=torch.uint8, device=device)

        dtype, per_byte = (torch.int8, 2) if packed else (torch.float8_e4m3fn, 1)
        self.w13 = stack(2 * self.up_row, hidden // per_byte).view(dtype)
        self.w2 = stack(hidden, inner // per_byte).view(dtype)
        self.w13_scale, self.w2_scale = stack(2 * lines, columns), stack(columns, lines)
        if packed:
            self.w13_sub = stack(2 * self.up_row, hidden // SUB_BLOCK)
            self.w2_sub = stack(hidden, inner // SUB_BLOCK)

    def put(
        self, expert: int, codes: Sequence[Fp8Weight], given: Sequence[BlockWeight]
    ) -> tuple[PreparedWeight, ...]:
        """Copy one expert in; its gate, up and down weights as views of the stacks."""
        lines, second = self.up_row // BLOCK, self.up_row
        upper, lower = slice(0, self.inner), slice(second, second + self.inner)
        w13, w13_scale = self.w13[expert], self.w13_scale[expert]
        places = (
            (w13[upper], w13_scale[:lines]),
            (w13[lower], w13_scale[lines:]),
            (self.w2[expert], self.w2_scale[expert]),
        )
        views: list[Fp8Weight | Fp4Weight] = []
        for i, ((data, scale), weight, source) in enumerate(zip(places, codes, given, strict=True)):
            scale.copy_(weight.scale)
            if self.packed and source.scale is not None:
                sub = (
                    self.w13_sub[expert][upper],
                    self.w13_sub[expert][lower],
                    self.w2_sub[expert],
                )
                data.copy_(to_device_order(source.data))
                sub[i].copy_(_readable_scales(source.scale, weight.scale))
                views.append(Fp4Weight(data=data, scale=sub[i]))
            else:
                data.copy_(weight.data)
                views.append(Fp8Weight(data=data, scale=scale, kind=weight.kind))
        return cast("tuple[PreparedWeight, ...]", tuple(views))

    def experts(
        self,
        gate: tuple[PreparedWeight, ...],
        up: tuple[PreparedWeight, ...],
        down: tuple[PreparedWeight, ...],
    ) -> Fp8Experts | Fp4Experts:
        """The filled stacks."""
        if self.packed:
            return Fp4Experts(
                w1=gate,
                w3=up,
                w2=down,
                hidden_size=self.hidden,
                intermediate_size=self.inner,
                device=self.device,
                w13=self.w13,
                w13_sub=self.w13_sub,
                w13_scale=self.w13_scale,
                w2_data=self.w2,
                w2_sub=self.w2_sub,
                w2_scale=self.w2_scale,
                up_row=self.up_row,
            )
        return Fp8Experts(
            w1=gate,
            w3=up,
            w2=down,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            device=self.device,
            w13=self.w13,
            w13_scale=self.w13_scale,
            w2_data=self.w2,
            w2_scale=self.w2_scale,
            up_row=self.up_row,
        )
