"""What the sanitizers run beside the cases of ``op_cases``, so that they meet every compiled kernel.

The cases call ops, which choose a tile by the number of rows; here each tile of the products is named,
on shapes that are small for the tools and odd: rows and columns that hang over, slices, several tiles a
block. ``CASES`` are shapes and formats that kernels take and no model has, and experts, which take the
place of the cases of their names. ``peer_sum`` has no case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch

from benchmarks.moe_cases import random_experts
from kernels import (
    BlockWeight,
    CacheDtype,
    EntryKind,
    peer_sum,
    prepare_experts,
    prepare_weight,
    quant_rows,
)
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.grouped_output import cuda_impl as grouped_output
from kernels.linear import product as plain_product
from kernels.linear import tuning as plain_tuning
from kernels.linear.device_weight import Fp8Weight
from kernels.peer_sum.api import CAPACITY
from kernels.quant_gemm import cuda_impl, cuda_launch, tuning
from kernels.quant_rows.api import empty_quant_rows
from tests.kernels.op_cases import attention, fused, pages, products, rows
from tests.kernels.op_cases.base import (
    BF16,
    Case,
    Make,
    fp4_weight,
    fp8_weight,
    frequencies,
    layout,
    positions,
)
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
# Rows, the weight's rows of which the first ones are left out, K: some fill a ring of four or seven stages.
SHAPES = ((300, 768, 64, 1040), (140, 40000, 16, 384), (300, 768, 64, 1024), (270, 400, 0, 1792))
ROWS_OF_EXPERTS = ((0, 200, 1, 77, 22), (300, 0, 64, 193, 43))


_SMALL = layout(EntryKind.LATENT, CacheDtype.BF16, 64, 128, 64)
_KEYS = layout(EntryKind.INDEX, CacheDtype.FP8, 64, 64, 0)
_WIDE_KEYS = layout(EntryKind.INDEX, CacheDtype.FP8, 64, 128, 0)
_LATENT = layout(EntryKind.LATENT, CacheDtype.FP8, 64, 512, 64)


def _ffn(hidden: int, inner: int, packed: bool, quant: bool) -> Make:
    """Three experts of random bytes: to make weights of values takes most of a minute under memcheck."""
    return products.rows_of_experts(
        lambda _: random_experts(packed, 3, hidden, inner), hidden, 3, quant=quant
    )


_MAKES: tuple[tuple[str, str, Make], ...] = (
    *(
        (
            f"compress{'_insert' * store}",
            f"{ratio} of {dim}",
            pages.compress(ratio, dim, 64, index=index, store=store),
        )
        for store in (False, True)
        for ratio, dim, index in ((4, 128, False), (128, 128, False), (4, 64, True))
    ),
    ("compress_decode", "4 of 512 and 64", fused.compress_decode(4, (_LATENT, _KEYS), 64, 2)),
    ("compress_decode", "4 of 128 and 64", fused.compress_decode(4, (_SMALL, _KEYS), 64, 2)),
    ("compress_decode", "4 of 128 and 128", fused.compress_decode(4, (_SMALL, _WIDE_KEYS), 64, 2)),
    ("compress_decode", "128 of 128", fused.compress_decode(128, (_SMALL,), 64, 2)),
    ("qkv_norm_rope", "dim 128", fused.qkv(8, 128, 64, 4, CacheDtype.BF16)),
    ("q_norm_rope", "dim 128", rows.head_query(8, 128, index=False)),
    ("kv_norm_rope", "dim 128", rows.kv_norm_rope(128, 64)),
    ("index_query", "dim 64", rows.head_query(8, 64, index=True)),
    *(("rms_norm_quant", f"bf16 weight {k}", rows.norm(k, True, BF16)) for k in (200, 4096, 7168)),
    ("quant_rows", "many", rows.rounding("quant_rows", 1536)),
    ("swiglu_quant", "many", rows.swiglu(1536, True, True)),
    ("merge_lse", "unaligned", attention.merge_lse(3, 5, 66, False)),
    ("moe_gate", "512 experts", products.gate(4096, 512, "bias")),
    *(
        (
            f"expert_ffn{'_quant' * quant}",
            f"{model}{' packed' * packed}",
            _ffn(*sizes, packed, quant),
        )
        for model, *sizes in (("flash", 4096, 2048), ("pro", 7168, 3072))
        for packed in (False, True)
        for quant in (False, True)
    ),
    *(
        (
            "sparse_attention",
            f"{heads} heads of bf16 pages",
            attention.attention(heads, "ring", 512, pages=CacheDtype.BF16),
        )
        for heads in (64, 6)
    ),
)
CASES = tuple(Case(op=op, name=name, make=make) for op, name, make in _MAKES)


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
    for plain in plain_tuning.TILES:
        yield f"tile-plain-{plain.index}", partial(_plain, plain.index)
    for index in range(grouped_output.TILES):
        yield f"tile-grouped-output-{index}", partial(_grouped_output, index)
    yield "peer_sum", _peer_sum


def _one_weight(tile: tuning.Tile) -> None:
    for count, n, first, k in SHAPES:
        weight: object = prepare_weight(fp8_weight(CUDA, n, k)).rows(first, n)
        x = quant_rows(torch.randn(count, k, device=CUDA))
        for dtype in DTYPES:
            out = torch.empty(count, n - first, dtype=dtype, device=CUDA)
            cuda_impl.multiply(tile, x, cast("Fp8Weight", weight), out)


def _offsets(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *counts], device=CUDA).cumsum(0)


def _fp8_experts(held: int, hidden: int, inner: int) -> Fp8Experts:
    up = [fp8_weight(CUDA, inner, hidden) for _ in range(held)]
    down = [fp8_weight(CUDA, hidden, inner) for _ in range(held)]
    return cast("Fp8Experts", prepare_experts(up, up, down))


def _experts(tile: tuning.Tile) -> None:
    for counts in ROWS_OF_EXPERTS:
        experts = _fp8_experts(len(counts), 384, 640)
        x = quant_rows(torch.randn(sum(counts) + 20, 384, device=CUDA))
        for dtype in DTYPES:
            out = torch.empty(x.shape[0], experts.w13.shape[1], dtype=dtype, device=CUDA)
            data, scale = experts.w13, experts.w13_scale
            cuda_impl.multiply_grouped(tile, x, data, scale, _offsets(counts), out)


def _gated(tile: tuning.Tile) -> None:
    whole: object = prepare_weight(fp8_weight(CUDA, 2 * 640, 272))
    for count in (16, 300) if tile is not tuning.GATED[256] else ():  # that is of many weights only
        x = quant_rows(torch.randn(count, 272, device=CUDA))
        cuda_impl.multiply_gated(tile, x, cast("Fp8Weight", whole), limit=10.0)
    for counts in ROWS_OF_EXPERTS:
        experts = _fp8_experts(len(counts), 512, 160)
        x = quant_rows(torch.randn(sum(counts) + 20, 512, device=CUDA))
        cuda_launch.gated_product(
            tile,
            x,
            experts.w13,
            experts.w13_scale,
            empty_quant_rows(x.shape[0], 160, CUDA),
            _offsets(counts),
            up_row=experts.up_row,
            row_weight=torch.rand(x.shape[0], device=CUDA),
            limit=10.0,
        )


def _packed(tile: tuning.PackedTile) -> None:
    for counts in ((3, 0, 5, 1), (0, 100, 40, 129)):
        up = [fp4_weight(CUDA, 288, 1024) for _ in counts]
        down = [fp4_weight(CUDA, 1024, 288) for _ in counts]
        experts = cast("Fp4Experts", prepare_experts(up, up, down, keep_fp4=True))
        packed, sub, scale = experts.w13, experts.w13_sub, experts.w13_scale
        x = quant_rows(torch.randn(sum(counts) + 20, 1024, device=CUDA))
        for dtype in DTYPES:
            out = torch.empty(x.shape[0], packed.shape[1], dtype=dtype, device=CUDA)
            offsets = _offsets(counts)
            cuda_launch.packed_product(tile, x, packed, sub, scale, out, offsets)
        cuda_launch.expand_fp4(packed, sub, scale, offsets)


def _plain(tile: int) -> None:
    for count, n, k in ((300, 200, 1000), (140, 2624, 512)):
        x, w = (torch.randn(size, k, device=CUDA).to(BF16) for size in (count, n))
        for dtype in DTYPES:
            plain_product.product(x, w, dtype, tile=tile)


def _grouped_output(tile: int) -> None:
    count, heads, groups, width = 140, 16, 2, 1024
    o = torch.randn(count, heads, 512, device=CUDA).to(BF16)
    weight = prepare_weight(BlockWeight(torch.randn(groups * width, 8 * 512, device=CUDA).to(BF16)))
    inputs = (o, positions(CUDA, count), frequencies(CUDA), weight, groups)
    out = torch.empty(count, groups * width, dtype=BF16, device=CUDA)
    codes = empty_quant_rows(count, groups * width, CUDA)
    as_bf16 = plain_product.Arguments(out=out.data_ptr(), out_stride=out.stride(0), out_kind=1)
    as_codes = plain_product.Arguments(
        out=codes.q.data_ptr(),
        out_stride=codes.q.stride(0),
        scale=codes.scale.data_ptr(),
        scale_stride=codes.scale.stride(0),
        out_kind=2,
    )
    for arguments in (as_bf16, as_codes):
        grouped_output._start("grouped_output", *inputs, arguments, tile)


def _peer_sum() -> None:
    """Of one rank alone: what the other one sends in the first round is there already."""
    for count in (2, 510, CAPACITY):
        rank, _ = ranks_of(2, CUDA)
        rank.boxes[0].view(torch.int32).view(-1, 4)[:] = torch.tensor([0, 1, 0, 1], device=CUDA)
        peer_sum(torch.randn(count, device=CUDA), rank)
