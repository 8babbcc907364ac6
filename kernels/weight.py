"""A slice of a weight in the checkpoint's own format, as ops receive it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """``data`` is e4m3 [n, k], packed FP4 int8 [n, k/2], bf16 [n, k] or float32 [n, k].

    Args:
        data: the slice's values.
        scale: E8M0 bytes as uint8; [ceil, ceil] 128x128 blocks that the slice touches (fp8), [n, k/32]
            (fp4); None for bf16 and float32.
        row_offset: rows of the first scale block that lie before the slice (fp8 only; 0..127).
        col_offset: likewise for columns.
    """

    data: Tensor
    scale: Tensor | None = None
    row_offset: int = 0
    col_offset: int = 0
