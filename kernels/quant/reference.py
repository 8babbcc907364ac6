"""Torch twins of the quantisation ops. Scales are made on bits.

Everything is float32 inside, for float64 input too: the official steps round float32 values, so
a float64 value becomes float32 first.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_E4M3_MAX = 448.0
_AMAX_FLOOR = 1e-4
_E2M1_MAX = 6.0
_FP4_FLOOR = 6.0 * 2.0**-126
_FP4_BLOCK = 32
_WEIGHT_BLOCK = 128
_INF_BITS = 0x7F800000
_MANTISSA_BITS = 0x7FFFFF
_E4M3_GRID = (3, -6)  # mantissa bits, smallest normal exponent
_E2M1_GRID = (1, 0)
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _split(x: Tensor, block: int, col_offset: int) -> Tensor:
    """[.., k] -> float32 [.., nblocks, block], zeros where a block reaches beyond the columns."""
    front = col_offset % block
    back = -(front + x.shape[-1]) % block
    padded = F.pad(x.float(), (front, back)) if front or back else x.float()
    return torch.unflatten(padded, -1, (padded.shape[-1] // block, block))


def _join(blocks: Tensor, columns: int, block: int, col_offset: int) -> Tensor:
    front = col_offset % block
    return blocks.flatten(-2)[..., front : front + columns]


def _ceil_bits(ratio: Tensor) -> Tensor:
    """Bits (int32) of the smallest power of two >= ratio (float32, > 0), plus a mantissa to drop.

    NaN counts as infinity.
    """
    return ratio.contiguous().view(torch.int32).clamp(max=_INF_BITS).add_(_MANTISSA_BITS)


def _scale_byte(ratio: Tensor) -> Tensor:
    """E8M0 byte (int32) of the smallest power of two >= ratio; 255 for infinity and NaN."""
    return _ceil_bits(ratio) >> 23


def _scale(ratio: Tensor) -> Tensor:
    """The smallest power of two >= ratio, itself; infinity for infinity and NaN.

    ``x * (1 / inf) * inf`` is NaN for every x, so rounding with such a scale makes a block NaN.
    """
    return (_ceil_bits(ratio) & _INF_BITS).view(torch.float32)


def _scale_value(byte: Tensor) -> Tensor:
    """float32 value of E8M0 bytes."""
    byte = byte.int()
    bits = byte << 23
    bits = bits.masked_fill(byte == 0, 0x00400000)  # 2^-127 is subnormal in float32
    return bits.masked_fill(byte == 255, 0x7FC00000).view(torch.float32)


def _fp8_ratio(amax: Tensor) -> Tensor:
    return amax.clamp(min=_AMAX_FLOOR).mul_(1.0 / _E4M3_MAX)


def _round_to_grid(x: Tensor, mantissa_bits: int, min_exponent: int) -> Tensor:
    """Round to the nearest value of a small float format, ties to even.

    Args:
        x: float32, finite and below 2^100; NaN stays NaN.
        mantissa_bits: stored mantissa bits of the format.
        min_exponent: exponent of its smallest normal number; below it the grid is even. There is no
            upper end.
    """
    # Adding 1.5 * 2^(e + 23 - m) leaves m bits below the leading one, at 2^e: the addition rounds.
    leading = (x.contiguous().view(torch.int32) & _INF_BITS).view(torch.float32)
    leading = leading.clamp_(min=2.0**min_exponent).mul_(1.5 * 2.0 ** (23 - mantissa_bits))
    return torch.copysign((x + leading).sub_(leading), x)  # the sum loses the sign of a zero


def to_e4m3(scaled: Tensor) -> Tensor:
    """e4m3 codes of float32 values, clamped to +-448."""
    return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_values(codes: Tensor) -> Tensor:
    """f32 values of e4m3 data (or its bytes) by table: torch's own cast is much slower on a CPU."""
    index = codes.view(torch.uint8).reshape(-1).to(torch.int32)
    return _e4m3_table(codes.device).index_select(0, index).view(codes.shape)


@functools.cache
def _e4m3_table(device: torch.device) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8, device=device)
    return every.view(torch.float8_e4m3fn).to(torch.float32)


def block_amax(x: Tensor, block: int, col_offset: int = 0) -> Tensor:
    """See ``kernels.quant.api.block_amax``."""
    return _split(x, block, col_offset).abs().amax(-1)


def fake_quant_fp8(
    x: Tensor, block: int, amax: Tensor | None = None, col_offset: int = 0
) -> Tensor:
    """See ``kernels.quant.api.fake_quant_fp8``."""
    blocks = _split(x, block, col_offset)
    peak = blocks.abs().amax(-1) if amax is None else amax.float()
    scale = _scale(_fp8_ratio(peak)).unsqueeze(-1)
    scaled = blocks * scale.reciprocal()  # powers of two: exact
    if amax is not None:  # a block's own maximum leaves nothing above 448 that rounds higher
        scaled = scaled.clamp_(-_E4M3_MAX, _E4M3_MAX)
    values = _round_to_grid(scaled, *_E4M3_GRID).mul_(scale)
    return _join(values, x.shape[-1], block, col_offset).to(x.dtype)


def act_quant(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """See ``kernels.quant.api.act_quant``."""
    blocks = _split(x, block, 0)
    scale = _scale_value(_scale_byte(_fp8_ratio(blocks.abs().amax(-1))))
    codes = to_e4m3(blocks * scale.reciprocal().unsqueeze(-1))
    return _join(codes, x.shape[-1], block, 0).contiguous(), scale


def _e2m1_code(magnitude: Tensor) -> Tensor:
    """Code 0..7 nearest to a magnitude; a tie goes to the even code, whose mantissa bit is 0."""
    m = magnitude
    return (
        (m > 0.25).int()
        + (m >= 0.75).int()
        + (m > 1.25).int()
        + (m >= 1.75).int()
        + (m > 2.5).int()
        + (m >= 3.5).int()
        + (m > 5.0).int()
    )


def _fp4_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [.., k/32, 32], and [.., k/32] whose next power of two is the scale of the FP4 rule."""
    blocks = _split(x, _FP4_BLOCK, 0)
    return blocks, blocks.abs().amax(-1).clamp_(min=_FP4_FLOOR).mul_(1.0 / _E2M1_MAX)


def fake_quant_fp4(x: Tensor) -> Tensor:
    """See ``kernels.quant.api.fake_quant_fp4``."""
    blocks, ratio = _fp4_blocks(x)
    scale = _scale(ratio).unsqueeze(-1)
    return (
        _round_to_grid(blocks * scale.reciprocal(), *_E2M1_GRID).mul_(scale).flatten(-2).to(x.dtype)
    )


def pack_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.quant.api.pack_fp4``."""
    blocks, ratio = _fp4_blocks(x)
    byte = _scale_byte(ratio)
    scaled = blocks / _scale_value(byte).unsqueeze(-1)
    codes = (_e2m1_code(scaled.abs()) + 8 * torch.signbit(scaled).int()).flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.to(torch.uint8).view(torch.int8), byte.to(torch.uint8)


def dequant_fp4(packed: Tensor, scale_u8: Tensor) -> Tensor:
    """See ``kernels.quant.api.dequant_fp4``."""
    table = torch.tensor(_E2M1_VALUES + tuple(-v for v in _E2M1_VALUES), device=packed.device)
    codes = packed.view(torch.uint8).int()
    values = torch.stack((table[codes & 15], table[codes >> 4]), dim=-1).flatten(-2)
    blocks = torch.unflatten(values, -1, (scale_u8.shape[-1], _FP4_BLOCK))
    return (blocks * _scale_value(scale_u8).unsqueeze(-1)).flatten(-2)


def dequant_fp8(data: Tensor, scale_u8: Tensor, row_offset: int = 0, col_offset: int = 0) -> Tensor:
    """See ``kernels.quant.api.dequant_fp8``."""
    n, k = data.shape
    scale = _scale_value(scale_u8)
    row = (torch.arange(n, device=data.device) + row_offset) // _WEIGHT_BLOCK
    col = (torch.arange(k, device=data.device) + col_offset) // _WEIGHT_BLOCK
    return e4m3_values(data).mul_(scale[:, col][row])


def quant_fp8_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.quant.api.quant_fp8_weight``."""
    n, k = w.shape
    blocks = _split(w, _WEIGHT_BLOCK, 0)  # [n, kb, 128]
    blocks = F.pad(blocks, (0, 0, 0, 0, 0, -n % _WEIGHT_BLOCK))
    blocks = torch.unflatten(blocks, 0, (blocks.shape[0] // _WEIGHT_BLOCK, _WEIGHT_BLOCK))
    byte = _scale_byte(_fp8_ratio(blocks.abs().amax(dim=(1, 3))))  # [nb, kb]
    codes = to_e4m3(blocks / _scale_value(byte)[:, None, :, None])
    return codes.flatten(2).flatten(0, 1)[:n, :k].contiguous(), byte.to(torch.uint8)
