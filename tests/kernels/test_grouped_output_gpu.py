"""The grouped output projection on the GPU: plain and as FP8 rows, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import (
    BlockWeight,
    PreparedWeight,
    QuantRows,
    grouped_output,
    grouped_output_quant,
    prepare_weight,
    quant_fp8_weight,
    quant_rows,
)
from kernels.grouped_output import reference
from kernels.rope.reference import apply_rope

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
LIMIT = 3e-3  # norm-wise: the rows' rounding after RoPE is the twin's, then one of the result


def frequencies() -> Tensor:
    return (10_000.0 ** -(torch.arange(32, device="cuda") / 32)).float()


def make(
    tokens: int, heads: int, dim: int, rank: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """o [T, H, d] between NaN rows and heads, positions up to a million, and wo_a's values."""
    wide = torch.full((tokens + 140, heads + 2, dim), float("nan"), device="cuda", dtype=BF16)
    wide[:tokens, 1 : 1 + heads] = torch.randn(tokens, heads, dim, device="cuda")
    positions = torch.randint(0, 1_048_576, (tokens,), device="cuda")
    columns = heads // groups * dim
    w = torch.randn(groups * rank, columns, device="cuda") / columns**0.5
    return wide[:tokens, 1 : 1 + heads], positions, w


def plain(w: Tensor) -> PreparedWeight:
    return prepare_weight(BlockWeight(w.bfloat16()))


def oracle(
    o: Tensor, positions: Tensor, inv_freq: Tensor, weight: PreparedWeight, groups: int
) -> Tensor:
    """The twin's rotated rows, rounded as it rounds them, and float64 sums."""
    turned = apply_rope(o, positions, inv_freq, inverse=True).double()
    w = weight.matrix.double().view(groups, -1, weight.in_features)
    rows = turned.reshape(o.shape[0], groups, -1)
    return torch.einsum("tgc,grc->tgr", rows, w).flatten(1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def same(got: QuantRows, want: QuantRows) -> bool:
    return torch.equal(got.q.view(torch.uint8), want.q.view(torch.uint8)) and torch.equal(
        got.scale, want.scale
    )


@pytest.mark.parametrize("tokens", [1, 16, 33, 128, 200, 600])
@pytest.mark.parametrize(
    ("heads", "dim", "rank", "groups"),
    [
        (16, 512, 1024, 2),  # decode slice of a rank: Flash over four
        (64, 512, 1024, 8),  # whole: Flash (Pro has 16 of the same groups)
        (6, 576, 200, 3),
        (2, 512, 72, 1),
    ],
)
def test_against_float64(tokens: int, heads: int, dim: int, rank: int, groups: int) -> None:
    o, positions, w = make(tokens, heads, dim, rank, groups)
    weight, inv_freq = plain(w), frequencies()
    got = grouped_output(o, positions, inv_freq, weight, groups)
    want = oracle(o, positions, inv_freq, weight, groups)
    assert error(got, want) < LIMIT
    rows = grouped_output_quant(o, positions, inv_freq, weight, groups)
    assert same(rows, quant_rows(got))


def test_every_tile_and_batch_gives_the_same_bits() -> None:
    from kernels.grouped_output import cuda_impl
    from kernels.linear import product
    from kernels.quant_rows.api import empty_quant_rows

    o, positions, w = make(300, 16, 512, 1024, 2)
    weight, inv_freq = plain(w), frequencies()
    whole = grouped_output(o, positions, inv_freq, weight, 2)
    codes = quant_rows(whole)
    for tile in range(cuda_impl.TILES):
        out = torch.full_like(whole, float("nan"))
        arguments = product.Arguments(out=out.data_ptr(), out_stride=2048, out_kind=1)
        cuda_impl._start("test", o, positions, inv_freq, weight, 2, arguments, tile)
        assert torch.equal(out, whole), tile
        rows = empty_quant_rows(300, 2048, out.device)
        arguments = product.Arguments(
            out=rows.q.data_ptr(),
            out_stride=rows.q.stride(0),
            scale=rows.scale.data_ptr(),
            scale_stride=rows.scale.stride(0),
            out_kind=2,
        )
        cuda_impl._start("test", o, positions, inv_freq, weight, 2, arguments, tile)
        assert same(rows, codes), tile
    for first, last in ((0, 1), (7, 20), (299, 300), (100, 228), (50, 110)):
        part = slice(first, last)
        alone = grouped_output(o[part], positions[part], inv_freq, weight, 2)
        assert torch.equal(alone, whole[part])
    # A group alone: what a decode slice of other ranks computes.
    second = grouped_output(o[:, 8:], positions, inv_freq, weight.rows(1024, 2048), 1)
    assert torch.equal(second, whole[:, 1024:])


def test_fp8_weights() -> None:
    """Kept as FP8 or dequantised at load: the same values."""
    o, positions, _ = make(40, 16, 512, 1024, 2)
    block = BlockWeight(*quant_fp8_weight(torch.randn(2048, 4096, device="cuda")))
    loaded, kept = prepare_weight(block, dequantize=True), prepare_weight(block)
    got = grouped_output(o, positions, frequencies(), loaded, 2)
    assert torch.equal(got, grouped_output(o, positions, frequencies(), kept, 2))
    assert error(got, oracle(o, positions, frequencies(), loaded, 2)) < LIMIT


def test_large_and_strange_values() -> None:
    """Infinite and NaN rows stay where they are, and their codes are NaN as in the twin."""
    o, positions, w = make(20, 16, 512, 1024, 2)
    weight, inv_freq = plain(w), frequencies()
    clean = grouped_output(o, positions, inv_freq, weight, 2)
    o[3, 0, 5], o[7, 9, 511] = float("nan"), float("inf")
    got = grouped_output(o, positions, inv_freq, weight, 2)
    others = torch.tensor([t for t in range(20) if t not in (3, 7)], device="cuda")
    assert torch.equal(got[others], clean[others])
    assert got[3, :1024].isnan().all()
    assert not got[7, 1024:].isfinite().any()
    assert torch.equal(got[3, 1024:], clean[3, 1024:])
    rows = grouped_output_quant(o, positions, inv_freq, weight, 2)
    assert same(rows, quant_rows(got))


def test_what_the_kernel_does_not_take() -> None:
    """Other dtypes and small heads run the twin."""
    inv_freq = frequencies()
    for dtype, dim, stored in (
        (torch.float32, 512, BF16),
        (BF16, 128, BF16),
        (BF16, 512, torch.float32),
    ):
        o = torch.randn(5, 4, dim, device="cuda").to(dtype)
        positions = torch.arange(5, device="cuda")
        w = prepare_weight(BlockWeight(torch.randn(256, 2 * dim, device="cuda").to(stored)))
        got = grouped_output(o, positions, inv_freq, w, 2)
        assert torch.equal(got, reference.grouped_output(o, positions, inv_freq, w, 2))
    o = torch.randn(0, 4, 512, device="cuda", dtype=BF16)
    w = plain(torch.randn(256, 1024, device="cuda"))
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    assert grouped_output(o, none, inv_freq, w, 2).shape == (0, 256)
    assert grouped_output_quant(o, none, inv_freq, w, 2).shape == (0, 256)


def test_graphs() -> None:
    o, positions, w = make(32, 16, 512, 1024, 2)
    weight, inv_freq = plain(w), frequencies()

    def run() -> QuantRows:
        return grouped_output_quant(o, positions, inv_freq, weight, 2)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    positions.add_(17)
    o.copy_(torch.randn(o.shape, device="cuda"))
    graph.replay()
    assert same(out, run())
