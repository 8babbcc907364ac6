"""Experts as the GPU keeps them: two FP8 stacks, gate and up fused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.grouped_gemm.api import PreparedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Experts(PreparedExperts):
    """``PreparedExperts`` whose weights are views of stacks that one launch multiplies.

    Args:
        w13: e4m3 [E, up_row + I padded to 128, D]: the gate's rows, then from ``up_row`` on the up's.
        w13_scale: E8M0 bytes of its 128x128 blocks.
        w2_data: e4m3 [E, D, I].
        w2_scale: E8M0 bytes of its 128x128 blocks.
        up_row: I padded to 128, so that both halves start a block.
    """

    w13: Tensor
    w13_scale: Tensor
    w2_data: Tensor
    w2_scale: Tensor
    up_row: int
