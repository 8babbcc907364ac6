"""FP4 as FP8: every value survives, or nothing is made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear.reencode import fp8_from_fp4
from tests.kernels.oracle64 import E2M1


def values64(packed: Tensor, scale: Tensor) -> Tensor:
    """FP4 by its definition, in float64: the even column in the low nibble, 2^(byte - 127) per 32."""
    codes = packed.view(torch.uint8)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    return table[nibbles] * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)


def decoded64(codes: Tensor, scale: Tensor) -> Tensor:
    """FP8 of 128x128 blocks by its definition, in float64."""
    n, k = codes.shape
    blocks = torch.exp2(scale.double() - 127)
    return codes.double() * blocks.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]


def random_fp4(n: int, k: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """All codes, sub-scales from ``low`` to ``high``."""
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8).view(torch.int8)
    return packed, torch.randint(low, high + 1, (n, k // 32), dtype=torch.uint8)


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 12),
    low=st.integers(0, 239),
    spread=st.integers(0, 14),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None)
def test_a_spread_of_two_to_the_14_always_survives(
    n: int, k: int, low: int, spread: int, seed: int
) -> None:
    torch.manual_seed(seed)
    packed, scale = random_fp4(n, 32 * k, low, low + spread)
    made = fp8_from_fp4(packed, scale)
    assert made is not None
    codes, blocks = made
    assert codes.shape == (n, 32 * k)
    assert blocks.shape == (-(-n // 128), -(-k // 4))
    assert torch.equal(decoded64(codes, blocks), values64(packed, scale))


@pytest.mark.parametrize("magnitude", range(1, 8))
def test_one_value_that_is_too_small_is_found(magnitude: int) -> None:
    """15 binades below the block's largest scale 0.5 and 1.5 are lost, the others at 19 at the latest."""
    for below, lost in ((14, False), (15, magnitude in (1, 3)), (19, True)):
        packed = torch.zeros(130, 64, dtype=torch.int8)
        scale = torch.full((130, 4), 140, dtype=torch.uint8)
        packed[:, 0] = 0x77
        packed[129, 63] = magnitude << 4
        scale[129, 3] = 140 - below
        made = fp8_from_fp4(packed, scale)
        assert (made is None) == lost, below
        if made is not None:
            assert torch.equal(decoded64(*made), values64(packed, scale))


def test_a_far_scale_without_a_value_is_no_obstacle() -> None:
    packed, scale = random_fp4(4, 128, 120, 120)
    packed[2, :16], scale[2, 0] = 0, 3
    made = fp8_from_fp4(packed, scale)
    assert made is not None
    assert torch.equal(decoded64(*made), values64(packed, scale))


def test_a_scale_that_is_no_number_is_not_encoded() -> None:
    packed, scale = random_fp4(4, 128, 120, 124)
    scale[1, 2] = 255
    assert fp8_from_fp4(packed, scale) is None
    assert fp8_from_fp4(packed[:0], scale[:0]) is None
