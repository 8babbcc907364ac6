"""The order of packed FP4 on a GPU: nothing is lost, and the kernel's few operations give FP8 codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import pack_fp4
from kernels.linear.fp4_order import from_device_order, to_device_order
from kernels.linear.reencode import fp8_from_fp4

LOWEST = -11  # kLowestShift of e2m1.cuh


def words_of(packed: Tensor) -> Tensor:
    """Device-ordered [n, k / 2] as integers [n, k / 32, 4]."""
    parts = torch.unflatten(packed.contiguous().view(torch.uint8).long(), -1, (-1, 4, 4))
    return (parts << torch.tensor([0, 8, 16, 24])).sum(-1)


def selected(table: Tensor, nibbles: Tensor) -> Tensor:
    """Four bytes of ``table`` [.., 8] named by the low four nibbles: prmt."""
    return torch.gather(table, -1, nibbles[..., None] >> torch.arange(0, 16, 4) & 7)


def signs(word: Tensor) -> Tensor:
    return word[..., None] >> torch.arange(0, 32, 8) & 128


def normal_table(index: Tensor) -> Tensor:
    """``e2m1_normal_table``, as eight bytes."""
    back, whole = -LOWEST, (1 << 32) - 1
    low = 0x3C383000 - back * 0x08080800 + index * 0x08080800 & whole
    high = 0x4C484440 - back * 0x08080808 + index * 0x08080808 & whole
    both = torch.stack((low, high), -1)[..., None] >> torch.arange(0, 32, 8)
    return (both & 255).flatten(-2)


def exact_table(index: Tensor) -> Tensor:
    """``e2m1_table``, as eight bytes."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = magnitudes * torch.exp2(index[..., None].float() + LOWEST)
    return values.clamp(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8).long()


def test_nothing_is_lost() -> None:
    packed = torch.randint(-128, 128, (6, 40, 256), dtype=torch.int8)
    ordered = to_device_order(packed)
    assert not torch.equal(ordered, packed)
    assert torch.equal(from_device_order(ordered), packed)
    assert torch.equal(to_device_order(packed[2:4, 7]), ordered[2:4, 7])


@pytest.mark.parametrize(("table", "spread"), [(normal_table, 8), (exact_table, 11)])
def test_the_kernels_operations_give_the_codes(
    table: Callable[[Tensor], Tensor], spread: int
) -> None:
    packed, sub = pack_fp4(torch.randn(192, 512))
    sub -= torch.randint(0, spread, sub.shape, dtype=torch.uint8)
    made = fp8_from_fp4(packed, sub)
    assert made is not None
    codes, scale = made
    line = scale.repeat_interleave(128, 0)[:192].repeat_interleave(4, 1)
    index = (sub.long() - line.long() - LOWEST)[..., None]
    assert int(index.min()) >= 0
    words = words_of(to_device_order(packed))
    entries = table(index).expand(-1, -1, 4, -1)
    magnitudes = words & 0x77777777
    first = selected(entries, magnitudes) | signs(words)
    second = selected(entries, magnitudes >> 16) | signs(words << 4)
    got = torch.stack((first, second), -3).flatten(-3).flatten(-2)  # [n, group, half, t, i]
    assert torch.equal(got, codes.view(torch.uint8).long())
