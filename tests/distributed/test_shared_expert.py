"""The shared expert in parts: whole hidden blocks of every rank, which add up to the whole."""

from __future__ import annotations

import pytest
import torch

from kernels import BlockWeight, Numerics, quant_fp8_weight, quant_rows
from model.deepseek_v4.projection import Activations, Projector
from model.deepseek_v4.shared_expert import SharedExpert, hidden_share, row_blocks
from model.parallel.collectives import Group


class Weights:
    """Three FP8 matrices under the checkpoint's names."""

    def __init__(self, hidden: int, dim: int) -> None:
        torch.manual_seed(5)
        shapes = {"w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden)}
        self.blocks = {
            f"shared.{name}.weight": BlockWeight(*quant_fp8_weight(torch.randn(shape) * 0.05))
            for name, shape in shapes.items()
        }

    def block(self, name: str) -> BlockWeight:
        return self.blocks[name]


def group(size: int, rank: int) -> Group:
    made = Group(None, 1, 0)
    made.size, made.rank = size, rank
    return made


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("columns", [64, 128, 384, 512, 700, 2048])
def test_shares_cover_every_column_once_in_whole_blocks(world: int, columns: int) -> None:
    shares = [hidden_share(columns, group(world, rank)) for rank in range(world)]
    assert [column for lo, hi in shares for column in range(lo, hi)] == list(range(columns))
    assert all(lo % 128 == 0 for lo, hi in shares if lo < hi)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_parts_add_up_to_the_whole(world: int) -> None:
    weights, projector = Weights(hidden=320, dim=256), Projector(Numerics.RELEASE)
    rows = torch.randn(5, 256).to(torch.bfloat16)
    x = Activations(rows, quant_rows(rows))
    whole = SharedExpert(weights, "shared", projector, 7.0, None)  # type: ignore[arg-type]
    assert whole.part(x) is None
    parts = []
    for rank in range(world):
        share = SharedExpert(weights, "shared", projector, 7.0, group(world, rank))  # type: ignore[arg-type]
        parts.append(share.part(x))
        assert torch.equal(share.whole(x), whole.whole(x))
    summed = sum(part for part in parts if part is not None)
    assert isinstance(summed, torch.Tensor)
    assert summed.dtype == torch.float32
    assert any(part is None for part in parts) == (world == 4)  # three blocks
    # The same products, added in another order, and not rounded to bf16.
    torch.testing.assert_close(summed, whole.whole(x).float(), rtol=2**-8, atol=1e-4)


def test_row_blocks_of_fp4_take_its_lines_of_scales() -> None:
    data = torch.arange(256 * 64, dtype=torch.int64).view(256, 64).to(torch.int8)
    scale = torch.arange(256 * 4, dtype=torch.int64).view(256, 4).to(torch.uint8)
    part = row_blocks(BlockWeight(data, scale), 128, 256)
    assert torch.equal(part.data, data[128:])
    assert part.scale is not None
    assert torch.equal(part.scale, scale[128:])
