"""FP8 products on the GPU against float64 sums of the same rounded operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    QuantRows,
    expert_ffn,
    expert_ffn_quant,
    linear,
    linear_quant,
    pack_fp4,
    prepare_experts,
    prepare_weight,
    quant_fp8_weight,
    quant_rows,
)
from kernels.grouped_gemm import reference as grouped_reference
from kernels.linear import reference as linear_reference
from kernels.quant_rows.api import empty_quant_rows

pytestmark = pytest.mark.gpu
# The tensor cores keep about 13 bits of a block's sum; float32 holds the sum of the blocks.
LIMIT = {torch.float32: 4e-4, torch.bfloat16: 3e-3}
DTYPES = [torch.float32, torch.bfloat16]


def fp8(n: int, k: int) -> BlockWeight:
    lines = torch.exp2(torch.randint(-6, 3, (-(-n // 128), -(-k // 128)), device="cuda").float())
    spread = lines.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda") * spread))


def fp4(n: int, k: int) -> BlockWeight:
    return BlockWeight(*pack_fp4(torch.randn(n, k, device="cuda") * 0.3))


def poisoned(rows: QuantRows) -> QuantRows:
    """The same rows inside buffers whose other bytes are NaN codes and NaN scales."""
    count, columns = rows.shape
    wide = empty_quant_rows(count + 150, columns + 32, rows.device, col_offset=rows.col_offset)
    wide.q.view(torch.uint8).fill_(0x7F)
    wide.scale.fill_(0xFF)
    q, scale = wide.q[:count, :columns], wide.scale[:count, : rows.scale.shape[1]]
    q.copy_(rows.q)
    scale.copy_(rows.scale)
    return QuantRows(q=q, scale=scale, col_offset=rows.col_offset)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 16, 17, 64, 100, 300])
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (200, 272), (130, 128), (1536, 4096)])
def test_products(n: int, k: int, count: int, dtype: torch.dtype) -> None:
    w = prepare_weight(fp8(n, k))
    rows = poisoned(quant_rows(torch.randn(count, k, device="cuda") * 4))
    out = linear_quant(rows, w, out_dtype=dtype)
    want = rows.values().double() @ w.matrix.double().t()
    assert out.shape == want.shape
    assert out.dtype == dtype
    assert error(out, want) < LIMIT[dtype]


@pytest.mark.parametrize(
    ("rows", "cols"),
    [((128, 384), (0, 640)), ((64, 330), (128, 640)), ((1, 100), (32, 544)), ((5, 400), (7, 455))],
)
def test_slices_of_a_weight(rows: tuple[int, int], cols: tuple[int, int]) -> None:
    whole = prepare_weight(fp8(400, 640))
    w = whole.rows(*rows).cols(*cols)
    x = torch.randn(70, w.in_features, device="cuda")
    peaks = torch.full((70, w.scale.shape[1]), 9.0, device="cuda")  # type: ignore[attr-defined]
    for amax in (None, peaks):
        got = linear(x, w, quantize=True, amax=amax)
        want = linear_reference.linear(x, w, quantize=True, amax=amax)
        assert error(got, want.double()) < LIMIT[torch.float32]
    assert torch.equal(w.matrix, whole.matrix[slice(*rows), slice(*cols)])


def test_every_tile_and_batch_gives_the_same_bits() -> None:
    from kernels.quant_gemm import cuda_impl, tuning

    w = prepare_weight(fp8(768, 1024)).rows(64, 768)
    rows = quant_rows(torch.randn(300, 1024, device="cuda"))
    outs = []
    tiles = (*tuning.TILES, *tuning.PAIRS, *tuning.OVERLAPS, *tuning.DUOS, tuning.DUO_OF_MANY)
    for tile in tiles:
        out = torch.full((300, 704), float("nan"), device="cuda")
        cuda_impl.multiply(tile, rows, w, out)  # type: ignore[arg-type]
        outs.append(out)
    for tile, out in zip(tiles, outs, strict=True):
        assert torch.equal(out, outs[0]), tile
    for first, last in ((0, 1), (7, 20), (299, 300), (100, 228)):
        part = QuantRows(q=rows.q[first:last], scale=rows.scale[first:last])
        alone = linear_quant(part, w, out_dtype=torch.float32)
        assert torch.equal(alone, outs[0][first:last])
    again = linear_quant(rows, w, out_dtype=torch.float32)
    assert torch.equal(again, outs[0])


@pytest.mark.parametrize("count", [65, 128, 200, 1000])
@pytest.mark.parametrize(
    ("n", "k", "first"),
    [
        *((4096, 2048, 0), (700, 128, 64), (1000, 384, 0), (336, 4224, 16), (40000, 640, 16)),
        (1100, 1792, 16),
    ],
)
def test_every_tile_and_output_gives_the_same_bits(n: int, k: int, first: int, count: int) -> None:
    """Tiles that hang over on either side, K of less, of whole and of more rings, one and many tiles."""
    from kernels.quant_gemm import cuda_impl, tuning

    w = prepare_weight(fp8(n, k)).rows(first, n)
    rows = poisoned(quant_rows(torch.randn(count, k, device="cuda")))
    want = torch.empty(count, n - first, device="cuda")
    cuda_impl.multiply(tuning.TILES[6], rows, w, want)  # type: ignore[arg-type]
    for tile in (*tuning.TILES, *tuning.PAIRS, *tuning.OVERLAPS, *tuning.DUOS, tuning.DUO_OF_MANY):
        for dtype in DTYPES:
            wide = torch.full((count + 70, n - first), float("nan"), dtype=dtype, device="cuda")
            cuda_impl.multiply(tile, rows, w, wide[:count])  # type: ignore[arg-type]
            assert torch.equal(wide[:count], want.to(dtype)), (tile, dtype)
            assert wide[count:].isnan().all(), (tile, dtype)


def make_experts(
    kind: Callable[[int, int], BlockWeight], count: int, hidden: int, inner: int
) -> tuple[list[BlockWeight], list[BlockWeight], list[BlockWeight]]:
    return (
        [kind(inner, hidden) for _ in range(count)],
        [kind(inner, hidden) for _ in range(count)],
        [kind(hidden, inner) for _ in range(count)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [fp8, fp4])
@pytest.mark.parametrize(("hidden", "inner"), [(512, 256), (96, 160)])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 300, 40, 129], [0, 0, 0, 0]])
def test_experts(
    counts: list[int],
    hidden: int,
    inner: int,
    kind: Callable[[int, int], BlockWeight],
    dtype: torch.dtype,
) -> None:
    parts = make_experts(kind, len(counts), hidden, inner)
    experts = prepare_experts(*parts)
    twins = grouped_reference.PreparedExperts(
        w1=tuple(linear_reference.prepare_weight(w) for w in parts[0]),
        w3=tuple(linear_reference.prepare_weight(w) for w in parts[1]),
        w2=tuple(linear_reference.prepare_weight(w) for w in parts[2]),
        hidden_size=hidden,
        intermediate_size=inner,
        device=experts.device,
    )
    for mine, twin in zip(experts.w3 + experts.w2, twins.w3 + twins.w2, strict=True):
        assert torch.equal(mine.matrix, twin.matrix)
    total = sum(counts)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    rows = torch.randn(total, hidden, device="cuda").to(dtype)
    weight = torch.rand(total, device="cuda") + 0.2
    got = expert_ffn(rows, offsets, weight, experts, limit=10.0, quantize=True)
    want = grouped_reference.expert_ffn(rows, offsets, weight, twins, limit=10.0, quantize=True)
    assert got.dtype == dtype
    assert got.shape == want.shape
    if not total:
        return
    assert error(got, want.double()) < (4e-3 if dtype is torch.float32 else 1e-2)
    again = expert_ffn_quant(
        quant_rows(rows), offsets, weight, experts, limit=10.0, out_dtype=dtype
    )
    assert torch.equal(again, got)
    # A row alone, as the only row of its expert, has the same bits.
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for row in (0, total // 2, total - 1):
        single = torch.zeros(len(counts) + 1, dtype=torch.int64, device="cuda")
        single[int(owner[row]) + 1 :] = 1
        alone = expert_ffn(
            rows[row : row + 1], single, weight[row : row + 1], experts, limit=10.0, quantize=True
        )
        assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize(
    ("counts", "inner"), [([0, 200, 1, 77, 22], 128), ([700, 0, 64, 193, 43], 640)]
)
def test_every_tile_gives_experts_the_same_bits(counts: list[int], inner: int) -> None:
    from kernels.grouped_gemm.device_experts import Fp8Experts
    from kernels.quant_gemm import cuda_impl, tuning

    experts = prepare_experts(*make_experts(fp8, len(counts), 384, inner))
    assert isinstance(experts, Fp8Experts)
    total = sum(counts)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    rows = quant_rows(torch.randn(total, 384, device="cuda"))
    want = torch.cat(
        [
            linear_quant(
                QuantRows(q=rows.q[a:b], scale=rows.scale[a:b]), w, out_dtype=torch.bfloat16
            )
            for w, a, b in zip(experts.w1, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
    )
    columns = experts.w13.shape[1]
    for tile in (*tuning.TILES, tuning.GROUPED):
        for dtype in DTYPES:
            out = torch.full((total + 90, columns), float("nan"), device="cuda", dtype=dtype)
            cuda_impl.multiply_grouped(tile, rows, experts.w13, experts.w13_scale, offsets, out)
            assert torch.equal(out[:total, :inner].bfloat16(), want), tile
            assert bool(out[total:].isnan().all())


@pytest.mark.parametrize(("hidden", "inner"), [(512, 256), (96, 160), (1024, 512)])
def test_packed_experts_have_the_bits_of_the_expanded(hidden: int, inner: int) -> None:
    from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
    from kernels.quant_gemm import cuda_impl

    parts = make_experts(fp4, 3, hidden, inner)
    for weight in parts[0]:
        weight.scale[::3] -= 4  # type: ignore[index]  # sub-scales that differ inside a block
    wide, packed = prepare_experts(*parts), prepare_experts(*parts, keep_fp4=True)
    assert isinstance(wide, Fp8Experts)
    assert isinstance(packed, Fp4Experts)
    codes = cuda_impl.expand_fp4(packed.w13, packed.w13_sub, packed.w13_scale, None)
    assert torch.equal(codes.view(torch.uint8), wide.w13.view(torch.uint8))
    for mine, other in zip(packed.w1 + packed.w2, wide.w1 + wide.w2, strict=True):
        assert torch.equal(mine.matrix, other.matrix)
    offsets = torch.tensor([0, 7, 7, 50], device="cuda")
    rows = torch.randn(50, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(50, device="cuda")
    got, want = (
        expert_ffn(rows, offsets, weight, experts, limit=10.0, quantize=True)
        for experts in (packed, wide)
    )
    assert torch.equal(got, want)


def test_fp4_that_fp8_cannot_hold_stays_exact() -> None:
    packed, scale = pack_fp4(torch.randn(64, 256, device="cuda"))
    scale[3, 1] += 30
    w = prepare_weight(BlockWeight(packed, scale))
    twin = linear_reference.prepare_weight(BlockWeight(packed, scale))
    assert torch.equal(w.matrix, twin.matrix)
    x = torch.randn(5, 256, device="cuda")
    got = linear(x, w, quantize=True)
    assert error(got, linear_reference.linear(x, twin, quantize=True).double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_plain_weights(stored: torch.dtype, dtype: torch.dtype) -> None:
    data = torch.randn(200, 512, device="cuda").to(stored)
    w = prepare_weight(BlockWeight(data)).rows(8, 200).cols(64, 512)
    x = torch.randn(3, 7, 448, device="cuda").to(dtype)
    for out_dtype in DTYPES:
        got = linear(x, w, quantize=True, out_dtype=out_dtype)
        want = x.double() @ data[8:200, 64:].double().t()
        assert got.dtype == out_dtype
        assert error(got, want) < (1e-5 if out_dtype is torch.float32 else 3e-3)


def test_graphs_replay_with_other_offsets() -> None:
    """Nothing of a grouped product is decided by the host from the offsets."""
    experts = prepare_experts(*make_experts(fp8, 4, 256, 128))
    rows = torch.randn(40, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(40, device="cuda")
    offsets = torch.tensor([0, 10, 20, 30, 40], device="cuda")

    def run() -> Tensor:
        return expert_ffn(rows, offsets, weight, experts, limit=10.0, quantize=True)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    offsets.copy_(torch.tensor([0, 0, 39, 39, 40]))
    graph.replay()
    assert torch.equal(out, run())
