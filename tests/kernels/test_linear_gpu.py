"""Products with plain weights on the GPU: float64 sums of the same operands, and the same bits always."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import BlockWeight, linear, prepare_weight, quant_fp8_weight

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
# Norm-wise: float32 sums of exact products, then one rounding to the result's dtype.
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 3e-3}
SHAPES = [  # (n, k)
    (2624, 4096),  # compressor, indexer compressor and indexer weights of a CSA layer: Flash
    (2624, 7168),  # Pro
    (1024, 4096),  # HCA compressor
    (64, 4096),
    (200, 272),
    (33, 64),
    (1, 8),
    (70, 1000),
    (257, 513),
]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def rows_in_nan(count: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows inside a wider tensor whose other values are NaN."""
    wide = torch.full((count + 200, k + 24), float("nan"), device="cuda", dtype=dtype)
    wide[:count, 8 : 8 + k] = torch.randn(count, k, device="cuda")
    return wide[:count, 8 : 8 + k]


@pytest.mark.parametrize("count", [1, 5, 16, 17, 64, 100, 128, 300])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products(n: int, k: int, count: int) -> None:
    w = torch.randn(n, k, device="cuda").bfloat16()
    weight = prepare_weight(BlockWeight(w))
    x = rows_in_nan(count, k)
    want = x.double() @ w.double().t()
    for dtype in DTYPES:
        out = linear(x, weight, quantize=False, out_dtype=dtype)
        assert out.shape == want.shape
        assert out.dtype == dtype
        assert error(out, want) < LIMIT[dtype]
    wide = linear(x, weight, quantize=False, out_dtype=torch.float32)
    assert torch.equal(wide.bfloat16(), linear(x, weight, quantize=False))


@pytest.mark.parametrize(("n", "k"), [(2624, 4096), (200, 1000), (64, 256), (130, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_and_batch_gives_the_same_bits(n: int, k: int, dtype: torch.dtype) -> None:
    from kernels.linear import product, tuning

    w = torch.randn(n, k, device="cuda").bfloat16()
    x = rows_in_nan(300, k)
    weight = prepare_weight(BlockWeight(w))
    whole = linear(x, weight, quantize=False, out_dtype=dtype)
    for tile in tuning.TILES:
        assert torch.equal(product.product(x, w, dtype, tile=tile.index), whole), tile
    for first, last in ((0, 1), (7, 20), (299, 300), (100, 228), (0, 129)):
        alone = linear(x[first:last], weight, quantize=False, out_dtype=dtype)
        assert torch.equal(alone, whole[first:last]), (first, last)
    # A weight's row alone, too: nothing depends on where in the weight it stands.
    part = linear(x, weight.rows(n // 3, n // 2), quantize=False, out_dtype=dtype)
    assert torch.equal(part, whole[:, n // 3 : n // 2])


def test_many_rows() -> None:
    w = torch.randn(130, 128, device="cuda").bfloat16()
    weight = prepare_weight(BlockWeight(w))
    x = torch.randn(70_001, 128, device="cuda").bfloat16()
    whole = linear(x, weight, quantize=False, out_dtype=torch.float32)
    assert error(whole, x.double() @ w.double().t()) < LIMIT[torch.float32]
    assert torch.equal(linear(x[-3:], weight, quantize=False, out_dtype=torch.float32), whole[-3:])


@pytest.mark.parametrize("count", [1, 30, 512])
def test_head(count: int) -> None:
    """A quarter of the LM head: one product for bf16 rows."""
    w = torch.randn(32320, 4096, device="cuda").bfloat16()
    x = torch.randn(count, 4096, device="cuda").bfloat16()
    weight = prepare_weight(BlockWeight(w))
    out = linear(x, weight, quantize=False, out_dtype=torch.float32)
    assert error(out[:, :999], x.double() @ w[:999].double().t()) < LIMIT[torch.float32]
    assert error(out[:, -9:], x.double() @ w[-9:].double().t()) < LIMIT[torch.float32]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_values_stay_exact(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Each part of a float32 value is multiplied exactly: nothing like TF32 remains."""
    w = torch.randn(200, 1024, device="cuda").to(stored)
    x = torch.randn(90, 1024, device="cuda").to(dtype)
    weight = prepare_weight(BlockWeight(w))
    out = linear(x, weight, quantize=True, out_dtype=torch.float32)
    assert error(out, x.double() @ w.double().t()) < 1e-6
    alone = linear(x[40:41], weight, quantize=True, out_dtype=torch.float32)
    assert torch.equal(alone, out[40:41])


@pytest.mark.parametrize("cut", [(0, 100), (3, 300), (5, 260)])
def test_columns_of_a_weight(cut: tuple[int, int]) -> None:
    """Columns that start anywhere, also where the copy engine cannot."""
    w = torch.randn(80, 320, device="cuda").bfloat16()
    weight = prepare_weight(BlockWeight(w)).cols(*cut)
    x = torch.randn(20, 320, device="cuda").bfloat16()[:, slice(*cut)]
    out = linear(x, weight, quantize=False, out_dtype=torch.float32)
    assert error(out, x.double() @ w[:, slice(*cut)].double().t()) < LIMIT[torch.float32]


def test_odd_rows() -> None:
    """Repeated rows (stride 0), rows at odd strides, no rows, no columns."""
    w = torch.randn(80, 328, device="cuda").bfloat16()
    weight = prepare_weight(BlockWeight(w))
    one = torch.randn(1, 328, device="cuda").bfloat16()
    single = linear(one, weight, quantize=False)
    assert torch.equal(linear(one.expand(9, -1), weight, quantize=False), single.expand(9, -1))
    odd = torch.randn(9, 331, device="cuda").bfloat16()[:, 1:329]
    assert torch.equal(
        linear(odd, weight, quantize=False), linear(odd.contiguous(), weight, quantize=False)
    )
    assert linear(one[:0], weight, quantize=False).shape == (0, 80)
    assert linear(one.view(1, 1, -1), weight, quantize=False).shape == (1, 1, 80)
    empty = linear(one[:, :0], weight.cols(7, 7), quantize=False)
    assert torch.equal(empty, torch.zeros_like(single))


def test_dequantised_weights() -> None:
    block = BlockWeight(*quant_fp8_weight(torch.randn(300, 256, device="cuda")))
    w, plain = prepare_weight(block), prepare_weight(block, dequantize=True)
    assert plain.matrix.dtype is torch.bfloat16
    assert torch.equal(plain.matrix.float(), w.matrix)
    assert not plain.kind.rounds_activations
    assert plain.rows(128, 256).row_offset == 0
    # The smallest scales are below what bf16 holds: float32 values then.
    small = prepare_weight(
        BlockWeight(block.data, torch.zeros_like(block.scale)),  # type: ignore[arg-type]
        dequantize=True,
    )
    assert small.matrix.dtype is torch.float32


def test_graphs() -> None:
    """Nothing is decided by the host from device data, and replays read what is there then."""
    w = torch.randn(2624, 4096, device="cuda").bfloat16()
    weight = prepare_weight(BlockWeight(w))
    x = torch.randn(40, 4096, device="cuda").bfloat16()

    def run() -> Tensor:
        return linear(x, weight, quantize=False, out_dtype=torch.float32)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, run())
