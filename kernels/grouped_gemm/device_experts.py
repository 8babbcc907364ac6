"""Experts as the GPU keeps them: two stacks, gate and up fused, in FP8 or in packed FP4."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4Experts(PreparedExperts):
    """``PreparedExperts`` in FP4, with the scales of the FP8 form that every product makes of it.

    Args:
        w13: packed int8 [E, up_row + I padded to 128, D / 2], rows as in ``Fp8Experts``, columns in
            the order of ``kernels.linear.fp4_order``.
        w13_sub: E8M0 bytes of its 1x32 blocks, at least the 128x128 block's - 11.
        w13_scale: E8M0 bytes of the 128x128 blocks of the FP8 form.
        w2_data: packed int8 [E, D, I / 2], likewise.
        w2_sub: E8M0 bytes of its 1x32 blocks, likewise.
        w2_scale: E8M0 bytes of the 128x128 blocks of the FP8 form.
        up_row: I padded to 128.
    """

    w13: Tensor
    w13_sub: Tensor
    w13_scale: Tensor
    w2_data: Tensor
    w2_sub: Tensor
    w2_scale: Tensor
    up_row: int
