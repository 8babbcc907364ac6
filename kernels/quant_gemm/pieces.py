"""Which products of many rows DeepGEMM serves where it is installed, and the scales it reads.

It multiplies pieces of fixed heights, so that every kernel it compiles is compiled by ``build``, and
reads scales as float32, those of rows column by column within a piece. A pass over the E8M0 bytes ahead
of it would cost 0.7 to 1.5 % of its time: whoever makes rows writes both forms (``QuantRows``), and
``prepare_weight`` makes a weight's once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import table

# (n, k) of a whole weight -> heights of pieces, tallest first, at which DeepGEMM was faster than the own
# kernel on an H200. Other heights are not, or slower.
FASTER: dict[tuple[int, int], tuple[int, ...]] = {
    (4096, 8192): (4096,),  # Flash: wo_b
    (4096, 4096): (4096,),  # shared w1 and w3
    (2048, 7168): (4096, 1024),  # Pro: wq_a and wkv
    (65536, 1536): (4096,),  # wq_b
    (7168, 16384): (4096,),  # wo_b
    (6144, 7168): (4096, 1024),  # shared w1 and w3
    (7168, 3072): (4096,),  # shared w2
}
_HEIGHTS = {  # k -> heights of all weights that read such rows
    k: tuple(sorted({h for (_, depth), some in FASTER.items() if depth == k for h in some}))
    for _, k in FASTER
}


def piece_height(rows: int, columns: int, device: torch.device) -> int | None:
    """Rows of a piece that products of ``rows`` rows are cut into; None where none would be served."""
    fits = [height for height in _HEIGHTS.get(columns, ()) if height <= rows]
    return fits[-1] if fits and _is_served(device) else None


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
