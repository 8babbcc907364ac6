"""Packed FP4 experts on the GPU: every tile has the bits of the FP8 form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    PreparedExperts,
    QuantRows,
    expert_ffn,
    pack_fp4,
    prepare_experts,
    quant_rows,
)
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.quant_rows.api import empty_quant_rows

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


def poisoned(rows: QuantRows) -> QuantRows:
    """The same rows inside buffers whose other bytes are NaN codes and NaN scales."""
    count, columns = rows.shape
    wide = empty_quant_rows(count + 150, columns + 32, rows.device)
    wide.q.view(torch.uint8).fill_(0x7F)
    wide.scale.fill_(0xFF)
    q, scale = wide.q[:count, :columns], wide.scale[:count, : rows.scale.shape[1]]
    q.copy_(rows.q)
    scale.copy_(rows.scale)
    return QuantRows(q=q, scale=scale)


def stacks(count: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP4 weights [count, n, k] as prepared experts hold them, and the codes of their FP8 form.

    Some blocks hold zeros alone; some rows of the second half need subnormal codes.
    """
    values = torch.randn(count, n, k, device="cuda")
    values[0, ::5, k // 2 : k // 2 + 32] = 0
    down = [BlockWeight(*pack_fp4(part)) for part in values]
    for weight in down:
        assert weight.scale is not None
        rows = weight.scale[n // 2 :: 7]
        rows -= torch.where(rows > 30, 11, 0).to(torch.uint8)
    empty = [BlockWeight(*pack_fp4(torch.zeros(k, n, device="cuda"))) for _ in range(count)]
    packed = prepare_experts(empty, empty, down, keep_fp4=True)
    wide = prepare_experts(empty, empty, down)
    assert isinstance(packed, Fp4Experts)
    assert isinstance(wide, Fp8Experts)
    for mine, other in zip(packed.w2, wide.w2, strict=True):
        assert torch.equal(mine.matrix, other.matrix)
    return packed.w2_data, packed.w2_sub, packed.w2_scale, wide.w2_data


def experts(hidden: int, inner: int, count: int) -> tuple[PreparedExperts, PreparedExperts]:
    """Packed, and in FP8."""

    def weights(n: int, k: int) -> list[BlockWeight]:
        return [BlockWeight(*pack_fp4(torch.randn(n, k, device="cuda"))) for _ in range(count)]

    parts = weights(inner, hidden), weights(inner, hidden), weights(hidden, inner)
    return prepare_experts(*parts, keep_fp4=True), prepare_experts(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (288, 512), (32, 2560)])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 100, 40, 129], [0, 0, 1, 0], [0, 0, 0, 0]])
def test_tiles_of_packed_weights_have_the_bits_of_fp8(
    counts: list[int], n: int, k: int, dtype: torch.dtype
) -> None:
    from kernels.quant_gemm import cuda_impl, cuda_launch, tuning

    packed, sub, scale, codes = stacks(len(counts), n, k)
    expanded = cuda_launch.expand_fp4(packed, sub, scale, None)
    assert torch.equal(expanded.view(torch.uint8), codes.view(torch.uint8))
    total = sum(counts)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    rows = poisoned(quant_rows(torch.randn(total + 20, k, device="cuda") * 4))  # 20 of nobody
    want = torch.full((total + 20, n), 7.0, device="cuda", dtype=dtype)
    cuda_impl.multiply_grouped(tuning.TILES[2], rows, codes, scale, offsets, want)
    assert bool((want[total:] == 7).all())
    for tile in tuning.PACKED_TILES:
        out = torch.full_like(want, 7.0)
        cuda_launch.packed_product(tile, rows, packed, sub, scale, out, offsets)
        assert torch.equal(out, want), tile


def test_packed_experts_replay_with_other_offsets() -> None:
    packed, wide = experts(512, 512, 4)
    rows = torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(40, device="cuda")
    offsets = torch.tensor([0, 10, 20, 30, 40], device="cuda")

    def run(weights: PreparedExperts) -> Tensor:
        return expert_ffn(rows, offsets, weight, weights, limit=10.0, quantize=True)

    run(packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(packed)
    offsets.copy_(torch.tensor([0, 0, 39, 39, 40]))
    graph.replay()
    assert torch.equal(out, run(wide))


@pytest.mark.parametrize("count", [1, 12, 40, 400])
def test_a_row_of_packed_experts_has_its_bits_in_any_batch(count: int) -> None:
    """Tiles of every size, and expanded weights, by the number of rows."""
    packed, wide = experts(512, 1024, 2)
    rows = torch.randn(400, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(400, device="cuda")
    offsets = torch.tensor([0, count // 4, count], device="cuda")
    got, want = (
        expert_ffn(rows[:count], offsets, weight[:count], w, limit=10.0, quantize=True)
        for w in (packed, wide)
    )
    assert torch.equal(got, want)
    alone = torch.tensor([0, 0, 1], device="cuda")
    single = expert_ffn(
        rows[count - 1 : count], alone, weight[count - 1 : count], packed, limit=10.0, quantize=True
    )
    assert torch.equal(single[0], got[count - 1])
