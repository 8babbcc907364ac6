"""What the sanitizers run beside the cases of ``op_cases``: every tile of the FP8 products, ``peer_sum``.

The cases call ops, which choose a tile by the number of rows; here each tile is named, on shapes that
are small for the tools and odd: rows and columns that hang over, slices, several tiles a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch

from kernels import peer_sum, prepare_experts, prepare_weight, quant_rows
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.linear.device_weight import Fp8Weight
from kernels.peer_sum.api import CAPACITY
from kernels.quant_gemm import cuda_impl, cuda_launch, tuning
from kernels.quant_rows.api import empty_quant_rows
from tests.kernels.op_cases.base import BF16, fp4_weight, fp8_weight
from tests.kernels.test_peer_sum import ranks_of

CUDA = torch.device("cuda")
DTYPES = (torch.float32, BF16)
ONE_WEIGHT = (
    *tuning.TILES,
    *tuning.PAIRS,
    *tuning.OVERLAPS,
    *tuning.DUOS,
    tuning.DUO_OF_MANY,
)
# Rows, the weight's rows of which the first ones are left out, K.
SHAPES = ((300, 768, 64, 1040), (140, 40000, 16, 384))
ROWS_OF_EXPERTS = ((0, 200, 1, 77, 22), (300, 0, 64, 193, 43))


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    """A name and a run for each."""
    for tile in ONE_WEIGHT:
        yield f"tile-{tile.index}", partial(_one_weight, tile)
    for tile in (*tuning.TILES, tuning.GROUPED):
        yield f"tile-experts-{tile.index}", partial(_experts, tile)
    for tile in tuning.GATED.values():
        yield f"tile-gated-{tile.index}", partial(_gated, tile)
    for packed in tuning.PACKED_TILES:
        yield f"tile-packed-{packed.index}", partial(_packed, packed)
    yield "peer_sum", _peer_sum


def _one_weight(tile: tuning.Tile) -> None:
    for count, n, first, k in SHAPES:
        weight: object = prepare_weight(fp8_weight(CUDA, n, k)).rows(first, n)
        rows = quant_rows(torch.randn(count, k, device=CUDA))
        for dtype in DTYPES:
            out = torch.empty(count, n - first, dtype=dtype, device=CUDA)
            cuda_impl.multiply(tile, rows, cast("Fp8Weight", weight), out)


def _offsets(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *counts], device=CUDA).cumsum(0)


def _fp8_experts(held: int, hidden: int, inner: int) -> Fp8Experts:
    up = [fp8_weight(CUDA, inner, hidden) for _ in range(held)]
    down = [fp8_weight(CUDA, hidden, inner) for _ in range(held)]
    return cast("Fp8Experts", prepare_experts(up, up, down))


def _experts(tile: tuning.Tile) -> None:
    for counts in ROWS_OF_EXPERTS:
        experts = _fp8_experts(len(counts), 384, 640)
        rows = quant_rows(torch.randn(sum(counts) + 20, 384, device=CUDA))
        for dtype in DTYPES:
            out = torch.empty(rows.shape[0], experts.w13.shape[1], dtype=dtype, device=CUDA)
            data, scale = experts.w13, experts.w13_scale
            cuda_impl.multiply_grouped(tile, rows, data, scale, _offsets(counts), out)


def _gated(tile: tuning.Tile) -> None:
    whole: object = prepare_weight(fp8_weight(CUDA, 2 * 640, 272))
    for count in (16, 300):
        rows = quant_rows(torch.randn(count, 272, device=CUDA))
        cuda_impl.multiply_gated(tile, rows, cast("Fp8Weight", whole), limit=10.0)
    for counts in ROWS_OF_EXPERTS:
        experts = _fp8_experts(len(counts), 512, 160)
        rows = quant_rows(torch.randn(sum(counts) + 20, 512, device=CUDA))
        cuda_launch.gated_product(
            tile,
            rows,
            experts.w13,
            experts.w13_scale,
            empty_quant_rows(rows.shape[0], 160, CUDA),
            _offsets(counts),
            up_row=experts.up_row,
            row_weight=torch.rand(rows.shape[0], device=CUDA),
            limit=10.0,
        )


def _packed(tile: tuning.PackedTile) -> None:
    for counts in ((3, 0, 5, 1), (0, 100, 40, 129)):
        up = [fp4_weight(CUDA, 288, 1024) for _ in counts]
        down = [fp4_weight(CUDA, 1024, 288) for _ in counts]
        experts = cast("Fp4Experts", prepare_experts(up, up, down, keep_fp4=True))
        packed, sub, scale = experts.w13, experts.w13_sub, experts.w13_scale
        rows = quant_rows(torch.randn(sum(counts) + 20, 1024, device=CUDA))
        for dtype in DTYPES:
            out = torch.empty(rows.shape[0], packed.shape[1], dtype=dtype, device=CUDA)
            offsets = _offsets(counts)
            cuda_launch.packed_product(tile, rows, packed, sub, scale, out, offsets)
        cuda_launch.expand_fp4(packed, sub, scale, offsets)


def _peer_sum() -> None:
    """Of one rank alone: what the other one sends in the first round is there already."""
    for count in (2, 510, CAPACITY):
        rank, _ = ranks_of(2, CUDA)
        rank.boxes[0].view(torch.int32).view(-1, 4)[:] = torch.tensor([0, 1, 0, 1], device=CUDA)
        peer_sum(torch.randn(count, device=CUDA), rank)
