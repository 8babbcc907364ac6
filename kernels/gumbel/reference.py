"""Torch twin of the noise: a splitmix64-like counter hash in wrapping int64 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


_WEYL = _signed(0x9E3779B97F4A7C15)
_STEP = _signed(0xD1342543DE82EF95)
_MUL_1 = _signed(0xBF58476D1CE4E5B9)
_MUL_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; ``>>`` on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every input bit reaches every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MUL_1
    x = (x ^ _shift_right(x, 27)) * _MUL_2
    return x ^ _shift_right(x, 31)


def gumbel_noise(seeds: Tensor, steps: Tensor, vocab: int, device: torch.device) -> Tensor:
    """See ``kernels.gumbel.api.gumbel_noise``."""
    return gumbel_columns(seeds.to(device), steps.to(device), 0, vocab)


def gumbel_columns(seeds: Tensor, steps: Tensor, first: int, count: int) -> Tensor:
    """Columns ``first .. first + count - 1`` of the noise, float32 [N, count]."""
    key = _mix(_mix(seeds + _WEYL) ^ (steps * _STEP))
    counter = torch.arange(first + 1, first + count + 1, device=seeds.device) * _WEYL
    bits = _shift_right(_mix(key.unsqueeze(1) + counter), 12)
    # Half a step off both ends: u is in (0, 1) and exact in float64, so both logarithms are finite.
    u = (bits.double() + 0.5) * 2.0**-52
    return u.log().neg_().log_().neg_().float()
