"""Products with SwiGLU in their store, and rows that no expert owns: bit for bit the ops they join."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    QuantRows,
    expert_ffn_quant,
    linear_quant,
    linear_swiglu_quant,
    prepare_experts,
    prepare_weight,
    quant_fp8_weight,
    quant_rows,
    swiglu_quant,
)
from kernels.quant_rows.api import empty_quant_rows

pytestmark = pytest.mark.gpu
LIMIT = 6.0
DTYPES = [torch.float32, torch.bfloat16]


def fp8(n: int, k: int) -> BlockWeight:
    lines = torch.exp2(torch.randint(-4, 3, (-(-n // 128), -(-k // 128)), device="cuda").float())
    spread = lines.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda") * spread * 0.1))


def some_rows(count: int, k: int) -> QuantRows:
    return quant_rows(torch.randn(count, k, device="cuda") * 2)


def assert_same(got: QuantRows, want: QuantRows, rows: int | None = None) -> None:
    assert got.shape == want.shape
    assert torch.equal(got.scale[:rows], want.scale[:rows])
    assert torch.equal(got.q[:rows].view(torch.uint8), want.q[:rows].view(torch.uint8))


def poisoned(like: QuantRows, count: int) -> QuantRows:
    """``count`` rows, of which the first are ``like`` and the others NaN codes with NaN scales."""
    rows = empty_quant_rows(count, like.shape[1], like.device)
    rows.q.view(torch.uint8).fill_(0x7F)
    rows.scale.fill_(0xFF)
    rows.q[: like.shape[0]] = like.q
    rows.scale[: like.shape[0]] = like.scale
    return rows


@pytest.mark.parametrize("count", [1, 16, 100, 300])
@pytest.mark.parametrize(("width", "k"), [(256, 1024), (128, 272), (640, 128)])
def test_a_gated_product_has_the_bits_of_the_two_ops(width: int, k: int, count: int) -> None:
    from kernels.quant_gemm import cuda_impl, tuning

    w = prepare_weight(fp8(2 * width, k))
    rows = some_rows(count, k)
    both = linear_quant(rows, w, out_dtype=torch.bfloat16)
    # The halves of one product are read where they are.
    want = swiglu_quant(both[:, :width], both[:, width:], limit=LIMIT)
    assert_same(want, swiglu_quant(both[:, :width].clone(), both[:, width:].clone(), limit=LIMIT))
    for tile in tuning.GATED.values():
        if tile.blocks > 1:  # walks the groups of many weights only
            with pytest.raises(RuntimeError, match=r"launch failed with error 1$"):
                cuda_impl.multiply_gated(tile, rows, w, limit=LIMIT)  # type: ignore[arg-type]
            continue
        assert_same(cuda_impl.multiply_gated(tile, rows, w, limit=LIMIT), want)  # type: ignore[arg-type]
    assert_same(linear_swiglu_quant(rows, w, limit=LIMIT, hidden_dtype=torch.bfloat16), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [7, 2100])
def test_first_half_of_a_feed_forward(count: int, dtype: torch.dtype) -> None:
    w = prepare_weight(fp8(1024, 512))
    rows = some_rows(count, 512)
    got = linear_swiglu_quant(rows, w, limit=LIMIT, hidden_dtype=dtype)
    both = linear_quant(rows, w, out_dtype=dtype)
    assert_same(got, swiglu_quant(both[:, :512], both[:, 512:], limit=LIMIT))


@pytest.mark.parametrize(("hidden", "inner"), [(512, 256), (96, 160), (256, 640)])
@pytest.mark.parametrize(
    "counts", [[3, 0, 5, 1], [0, 300, 40, 129], [1] * 70 + [0, 260, 65], [700, 0, 64, 193]]
)
def test_gated_experts(counts: list[int], hidden: int, inner: int) -> None:
    from kernels.grouped_gemm.device_experts import Fp8Experts
    from kernels.quant_gemm import cuda_impl, cuda_launch, tuning

    size = len(counts)
    parts = [[fp8(n, k)] * size for n, k in ((inner, hidden), (inner, hidden), (hidden, inner))]
    experts = prepare_experts(*parts)
    assert isinstance(experts, Fp8Experts)
    total = sum(counts)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    rows = poisoned(some_rows(total, hidden), total + 90)
    weight = torch.rand(total + 90, device="cuda") + 0.2
    up, w13 = experts.up_row, experts.w13
    both = torch.empty(total + 90, w13.shape[1], device="cuda", dtype=torch.bfloat16)
    cuda_impl.multiply_grouped(tuning.TILES[10], rows, w13, experts.w13_scale, offsets, both)
    want = swiglu_quant(both[:, :inner], both[:, up : up + inner], limit=LIMIT, row_weight=weight)
    for tile in tuning.GATED.values():
        got = empty_quant_rows(total + 90, inner, rows.device)
        got.q.view(torch.uint8).fill_(0x55)
        got.scale.fill_(0x55)
        cuda_launch.gated_product(
            tile,
            rows,
            w13,
            experts.w13_scale,
            got,
            offsets,
            up_row=up,
            row_weight=weight,
            limit=LIMIT,
        )
        assert_same(got, want, total)
        assert bool((got.q[total:].view(torch.uint8) == 0x55).all())
        assert bool((got.scale[total:] == 0x55).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 300, 40, 129], [0, 0, 0, 0]])
def test_rows_behind_the_last_expert_belong_to_nobody(
    counts: list[int], dtype: torch.dtype
) -> None:
    """Also when a graph made for other offsets is replayed."""
    parts = [[fp8(n, k) for _ in counts] for n, k in ((256, 384), (256, 384), (384, 256))]
    experts = prepare_experts(*parts)
    total, room = sum(counts), 700
    mine = some_rows(total, 384)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    weight = torch.rand(room, device="cuda")
    weight[total:] = float("nan")
    want = expert_ffn_quant(mine, offsets, weight[:total], experts, limit=LIMIT, out_dtype=dtype)
    rows = poisoned(mine, room)
    moving = torch.arange(len(counts) + 1, device="cuda")

    def run() -> Tensor:
        return expert_ffn_quant(rows, moving, weight, experts, limit=LIMIT, out_dtype=dtype)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    moving.copy_(offsets)
    graph.replay()
    assert torch.equal(out[:total], want)
    assert bool(want.isfinite().all())
