"""Device functions that the Triton kernels share. Only Triton implementations import this file.

Shapes: P is a row's width padded to a power of two; tiles are [rows, P] float32 unless stated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

QUANT_BLOCK = tl.constexpr(64)
FP4_BLOCK = tl.constexpr(32)

_AMAX_FLOOR_BITS = tl.constexpr(0x38D1B717)  # float32 1e-4
_FP4_FLOOR_BITS = tl.constexpr(0x01C00000)  # float32 6 * 2^-126
_INDEX_FLOOR_BITS = tl.constexpr(0x04E00000)  # float32 448 * 2^-126
_RECIP_448 = tl.constexpr(1.0 / 448.0)
_RECIP_6 = tl.constexpr(1.0 / 6.0)
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 added to it is rounded to an integer
_RINT64 = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# pi/2 in two parts. The first has 33 bits, so its product with a quadrant below 2^20 is exact.
_HALF_PI_HIGH = tl.constexpr(1.57079632673412561417e00)
_HALF_PI_LOW = tl.constexpr(6.07710050650619224932e-11)


@triton.jit
def _f64(value: tl.constexpr):
    return tl.full((), value, tl.float64)


@triton.jit
def sincos(angle):
    """``(sin, cos)`` of float32 angles, |angle| < 1.6e6, correct to half a float32 ulp and a bit.

    Reduced and evaluated in float64 without branches: a position of a million costs what 1 costs.
    """
    x = angle.to(tl.float64)
    shifted = x * _f64(_TWO_OVER_PI) + _f64(_RINT64)
    turns = shifted - _f64(_RINT64)
    quadrant = (shifted.to(tl.int64, bitcast=True) & 3).to(tl.int32)
    r = (x - turns * _f64(_HALF_PI_HIGH)) - turns * _f64(_HALF_PI_LOW)
    z = r * r
    s = _f64(-1.0 / 39916800.0)
    s = s * z + _f64(1.0 / 362880.0)
    s = s * z + _f64(-1.0 / 5040.0)
    s = s * z + _f64(1.0 / 120.0)
    s = s * z + _f64(-1.0 / 6.0)
    s = (s * z * r + r).to(tl.float32)
    c = _f64(-1.0 / 3628800.0)
    c = c * z + _f64(1.0 / 40320.0)
    c = c * z + _f64(-1.0 / 720.0)
    c = c * z + _f64(1.0 / 24.0)
    c = c * z + _f64(-0.5)
    c = (c * z + _f64(1.0)).to(tl.float32)
    swap = (quadrant & 1) != 0
    sin = tl.where(swap, c, s)
    cos = tl.where(swap, s, c)
    sin = tl.where((quadrant & 2) != 0, -sin, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    return sin, cos


@triton.jit
def rotate_row_tail(x, position, freq, FIRST: tl.constexpr, PAIRS: tl.constexpr):
    """Rotate pairs FIRST .. FIRST + PAIRS - 1 of each row of ``x`` [rows, P]; position f32 [rows].

    The other pairs turn by an angle of zero, which leaves finite values as they are.
    """
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    even, odd = tl.split(tl.reshape(x, (rows, half, 2)))
    pair = tl.arange(0, half) - FIRST
    rotary = (pair >= 0) & (pair < PAIRS)
    f = tl.load(freq + pair, mask=rotary, other=0.0)
    sin, cos = sincos(position[:, None] * f[None, :])
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(rotated, (rows, x.shape[1]))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_bits(x, AXIS: tl.constexpr):
    """Largest magnitude of float32 ``x`` along an axis, as int32 bits; NaN is above all."""
    return tl.reduce(tl.abs(x), AXIS, _larger).to(tl.int32, bitcast=True)


@triton.jit
def _scale_byte(ratio):
    bits = ratio.to(tl.int32, bitcast=True)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.minimum(byte, 255)


@triton.jit
def fp8_scale_byte(amax_bits):
    """E8M0 byte (int32) of the FP8 rule from the bits of a block's largest magnitude."""
    peak = tl.maximum(amax_bits, _AMAX_FLOOR_BITS).to(tl.float32, bitcast=True)
    return _scale_byte(peak * _RECIP_448)


@triton.jit
def fp4_scale_byte(amax_bits):
    """E8M0 byte (int32) of the FP4 rule."""
    peak = tl.maximum(amax_bits, _FP4_FLOOR_BITS).to(tl.float32, bitcast=True)
    return _scale_byte(peak * _RECIP_6)


@triton.jit
def index_scale_byte(amax_bits):
    """Exponent byte (int32) of an index entry's scale, ``2^ceil(log2(amax / 448))``."""
    peak = tl.maximum(amax_bits, _INDEX_FLOOR_BITS).to(tl.float32, bitcast=True)
    return _scale_byte(tl.div_rn(peak, 448.0))


@triton.jit
def scale_value(byte):
    """float32 ``2^(byte - 127)`` of bytes 1..255, 255 is NaN."""
    bits = tl.where(byte == 255, 0x7FC00000, byte << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_inverse(byte):
    """float32 ``2^(127 - byte)`` of bytes 1..253, 255 is NaN: dividing by a scale, exactly."""
    bits = tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _round_on_grid(x, smallest_bits, shift):
    """``x`` rounded to steps of its own power of two (at least the smallest one) times a constant.

    Adding 1.5 * 2^23 steps makes the addition do the rounding, ties to even. Scaling by powers of two
    is exact, so this is scale, round, scale back in one.
    """
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, smallest_bits)
    anchor = power.to(tl.float32, bitcast=True) * shift
    return (x + anchor) - anchor


@triton.jit
def on_fp8_grid(x, byte):
    """Values of e4m3 codes under scale bytes (broadcastable to ``x``), for |x| <= 448 scales."""
    smallest = tl.where(byte == 255, 0x7FC00000, (byte - 6) << 23)
    return _round_on_grid(x, smallest, _RINT / 8.0)


@triton.jit
def fake_fp8(x, BLOCK: tl.constexpr):
    """FP8 rounding of ``x`` [rows, P] in blocks of BLOCK columns."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (rows, width // BLOCK, BLOCK))
    byte = fp8_scale_byte(largest_bits(blocks, 2))[:, :, None]
    return tl.reshape(on_fp8_grid(blocks, byte), (rows, width))


@triton.jit
def fake_fp4(x):
    """FP4 rounding of ``x`` [rows, P] in blocks of 32 columns, ties to the even code."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (rows, width // FP4_BLOCK, FP4_BLOCK))
    byte = fp4_scale_byte(largest_bits(blocks, 2))[:, :, None]
    smallest = tl.where(byte == 255, 0x7FC00000, byte << 23)
    return tl.reshape(_round_on_grid(blocks, smallest, _RINT / 2.0), (rows, width))


@triton.jit
def sylvester(N: tl.constexpr):
    """The +-1 matrix [N, N] of a Hadamard rotation, bfloat16."""
    both = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    if N > 256:
        both = both ^ (both >> 8)
    odd = (0x6996 >> ((both ^ (both >> 4)) & 15)) & 1  # parity of the bits, from a table of 16
    return (0x3F80 | (odd << 15)).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def hadamard_rows(x, matrix, scale, NARROW: tl.constexpr):
    """``x @ matrix * scale`` [rows, n]: float32 sums of exact products.

    NARROW says that ``x`` holds bfloat16 values; else it travels as three bfloat16 parts that add up
    to it.
    """
    high = x.to(tl.bfloat16)
    if NARROW:
        total = tl.dot(high, matrix)
    else:
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, matrix)
        total = tl.dot(middle, matrix, total)
        total = tl.dot(high, matrix, total)
    return total * scale


def _is_float64(value: object) -> bool:
    return value is torch.float64 or (isinstance(value, Tensor) and value.dtype is torch.float64)


def twin_for_float64(twin: Callable[P, T]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: calls with a float64 tensor (the oracle's) go to the torch twin.

    The kernels compute in float32.
    """

    def decorate(kernel: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(kernel)
        def choose(*args: P.args, **kwargs: P.kwargs) -> T:
            wide = any(map(_is_float64, (*args, *kwargs.values())))
            return (twin if wide else kernel)(*args, **kwargs)

        return choose

    return decorate


def padded(size: int, smallest: int = 1) -> int:
    """The power of two that a tile needs to hold ``size`` values."""
    return max(smallest, int(triton.next_power_of_2(max(size, 1))))
