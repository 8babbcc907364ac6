"""Which products of many rows DeepGEMM serves where it is installed, and the scales it reads.

It multiplies pieces of fixed heights, so that every kernel it compiles is compiled by ``build``, and
reads scales as float32, those of rows column by column within a piece. A pass over the E8M0 bytes ahead
of it would cost about 1.5 us: whoever makes rows writes both forms (``QuantRows.scale_columns``), and
``prepare_weight`` makes a weight's once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import table

# (n, k) of a whole weight -> heights of pieces, tallest first, at which DeepGEMM was faster than the own
# kernel on an H200. Other heights are not, or slower.
TALLEST = 4096
_ALL = (TALLEST, 2048, 1024)
FASTER: dict[tuple[int, int], tuple[int, ...]] = {
    (1536, 4096): _ALL,  # Flash: wq_a and wkv
    (32768, 1024): _ALL,  # wq_b
    (4096, 8192): _ALL,  # wo_b
    (4096, 4096): _ALL,  # shared w1 and w3
    (4096, 2048): _ALL,  # shared w2
    (8192, 1024): _ALL,  # indexer wq_b
    (2048, 7168): _ALL,  # Pro: wq_a and wkv
    (65536, 1536): _ALL,  # wq_b
    (7168, 16384): (TALLEST,),  # wo_b
    (6144, 7168): _ALL,  # shared w1 and w3
    (7168, 3072): (TALLEST,),  # shared w2
    (8192, 1536): _ALL,  # indexer wq_b
}
_HEIGHTS = {  # k -> heights of all weights that read such rows
    k: tuple(sorted({h for (_, depth), some in FASTER.items() if depth == k for h in some}))
    for _, k in FASTER
}


def piece_height(rows: int, columns: int, device: torch.device) -> int | None:
    """Rows of a piece that products of ``rows`` rows are cut into; None where none would be served.

    What is left over goes to the own kernel, whose last tiles then fill less of the machine: pieces
    gain by it only where nothing is left, or little of the whole.
    """
    heights = _HEIGHTS.get(columns, ())
    fits = [height for height in heights if _fits(rows, height)]
    return fits[-1] if fits and _is_served(device) else None


def _fits(rows: int, height: int) -> bool:
    return 0 < height <= rows and (rows % height == 0 or rows >= 2 * TALLEST)


def weight_scale(data: Tensor, scale: Tensor) -> Tensor | None:
    """The scales of a whole FP8 weight [n, k] as float32; None where no piece of rows meets it."""
    n, k = data.shape
    whole = data.is_contiguous() and scale.is_contiguous() and scale.shape == (n // 128, k // 128)
    if not whole or (n, k) not in FASTER or not _is_served(data.device):
        return None
    byte = scale.int()
    bits = (byte << 23).masked_fill(byte == 0, 0x00400000).masked_fill(byte == 255, 0x7FC00000)
    return bits.view(torch.float32)


def _is_served(device: torch.device) -> bool:
    return table(device)["linear_quant"].backend is not None
