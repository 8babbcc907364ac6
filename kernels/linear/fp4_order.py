"""The order in which the GPU keeps packed FP4: 32 columns as the tensor cores take them from registers.

Of 32 columns (16 bytes) word t, of four, holds the columns 4t + i and 16 + 4t + i, i below 4. The
magnitude of the first ones is in nibble i, of the others in nibble 4 + i. Their signs are bit 3 of
nibble 2i + 1, and of nibble 2i: where a shift by none and by 4 brings them to the top of a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 32  # that keep together: those of one scale


def to_device_order(packed: Tensor) -> Tensor:
    """``packed`` int8 [.., k / 2], the even column in the low nibble, k a multiple of 32, reordered."""
    codes = torch.unflatten(packed.view(torch.uint8), -1, (-1, COLUMNS // 2))
    columns = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    halves = torch.unflatten(columns, -1, (2, 4, 4))  # [.., half, t, i]
    first, second = halves.unbind(-3)
    nibbles = torch.cat((first, second), dim=-1) & 7  # [.., t, 8]
    signs = torch.stack((second, first), dim=-1).flatten(-2) & 8
    nibbles = nibbles | signs
    words = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return words.flatten(-3).view(torch.int8)


def from_device_order(ordered: Tensor) -> Tensor:
    """What ``to_device_order`` was given."""
    words = torch.unflatten(ordered.contiguous().view(torch.uint8), -1, (-1, 4, 4))
    nibbles = torch.stack((words & 15, words >> 4), dim=-1).flatten(-2)  # [.., t, 8]
    magnitudes, signs = nibbles & 7, nibbles & 8
    first = magnitudes[..., :4] | signs[..., 1::2]
    second = magnitudes[..., 4:] | signs[..., 0::2]
    columns = torch.stack((first, second), dim=-3).flatten(-3)
    packed = columns[..., 0::2] | columns[..., 1::2] << 4
    return packed.flatten(-2).view(torch.int8)
