"""FP4 weights as FP8: 1x32 scales folded into 128x128 ones, kept only where no value changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quant.api import dequant_fp4, dequant_fp8

_SUB_BLOCK = 32
_BLOCK = 128
_HEADROOM = 6  # 6 * 2^6 = 384 is the largest value that a code may take in e4m3


def fp8_from_fp4(packed: Tensor, scale_u8: Tensor) -> tuple[Tensor, Tensor] | None:
    """Re-encode one FP4 tensor, and prove that every value survived.

    The scale of a 128x128 block is its largest sub-scale / 2^6; each value times its sub-scale over
    the block's scale must be an e4m3 value, which holds while the sub-scales of a block spread at
    most 2^14. The proof does not use that rule: both encodings are decoded and compared.

    Args:
        packed: int8 [n, k / 2].
        scale_u8: E8M0 bytes [n, k / 32].

    Returns:
        ``(e4m3 [n, k], E8M0 bytes [ceil(n / 128), ceil(k / 128)])``, or None if a value would change.
        Reads its verdict on the host: for load time only.
    """
    values = dequant_fp4(packed, scale_u8)
    n, k = values.shape
    if values.numel() == 0:
        return None
    grid = F.pad(scale_u8, (0, -scale_u8.shape[1] % (_BLOCK // _SUB_BLOCK), 0, -n % _BLOCK))
    lines, columns = grid.shape[0] // _BLOCK, grid.shape[1] * _SUB_BLOCK // _BLOCK
    largest = grid.view(lines, _BLOCK, columns, _BLOCK // _SUB_BLOCK).amax((1, 3)).int()
    scale = (largest - _HEADROOM).clamp(min=1)
    # 2^(127 - scale) in two steps, since one float32 power of two may not reach that far.
    half = (127 - scale) // 2
    inverse = torch.ldexp(torch.ones_like(half, dtype=torch.float32), half)
    rest = torch.ldexp(torch.ones_like(half, dtype=torch.float32), 127 - scale - half)
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=values.device)
    for line in range(lines):
        part = slice(line * _BLOCK, min((line + 1) * _BLOCK, n))
        factor = inverse[line].repeat_interleave(_BLOCK)[:k]
        last = rest[line].repeat_interleave(_BLOCK)[:k]
        codes[part] = (values[part] * factor * last).to(torch.float8_e4m3fn)
    packed_scale = scale.to(torch.uint8)
    if not torch.equal(dequant_fp8(codes, packed_scale), values):
        return None
    return codes, packed_scale
