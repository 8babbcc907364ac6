"""Slow fp64 formulas of the spec, written apart from the product code, for the op tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, PageLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CACHE_DTYPES = list(CacheDtype)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that one f32 sum, one bf16 rounding, or one f64 sum may leave."""
    if dtype is torch.float64:
        return 1e-11
    return 2e-5 if dtype is torch.float32 else 2.0**-7


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """f64 values rounded to the compute dtype, back in f64."""
    if dtype is torch.float64:
        return value
    return value.to(torch.float32).to(dtype).to(torch.float64)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float | None = None) -> None:
    """Elementwise within ``tolerance`` of the larger of |want| and ``scale`` (default max |want|)."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    if want.numel() == 0:
        return
    top = float(want.abs().max()) if scale is None else scale
    error = (got.to(torch.float64) - want.to(torch.float64)).abs().max()
    assert float(error) <= tolerance(dtype) * max(top, 1e-3), f"error {float(error)} of {top}"


def frequencies(rope_dim: int, theta: float = 10000.0) -> Tensor:
    """f32 inverse frequencies of ``rope_dim`` rotary dims."""
    return torch.tensor([theta ** (-2 * i / rope_dim) for i in range(rope_dim // 2)])


def rope64(x: Tensor, position: int, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """One row [d] rotated pair by pair in f64, the angle rounded to f32 first."""
    out = x.to(torch.float64).clone()
    first = x.shape[0] - 2 * len(inv_freq)
    for i, freq in enumerate(inv_freq.numpy()):
        angle = float(np.float32(np.float32(position) * np.float32(freq)))
        cos, sin = math.cos(angle), math.sin(angle) * (-1 if inverse else 1)
        a, b = float(out[first + 2 * i]), float(out[first + 2 * i + 1])
        out[first + 2 * i] = a * cos - b * sin
        out[first + 2 * i + 1] = a * sin + b * cos
    return out


def rms64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one row in f64."""
    wide = x.to(torch.float64)
    return wide / math.sqrt(float((wide * wide).mean()) + eps) * weight.to(torch.float64)


def ceil_pow2(value: float) -> float:
    """Smallest power of two >= value > 0."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def _e4m3_grid() -> list[float]:
    grid = []
    for code in range(127):  # code 127 is NaN
        exponent, mantissa = code >> 3, code & 7
        grid.append(
            math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
        )
    return grid


_GRID = np.array(_e4m3_grid())


def e4m3(value: float) -> float:
    """Nearest e4m3 value, ties to the even code, clamped to 448."""
    magnitude = min(abs(value), 448.0)
    right = int(np.searchsorted(_GRID, magnitude))
    left = max(right - 1, 0)
    right = min(right, len(_GRID) - 1)
    low, high = magnitude - _GRID[left], _GRID[right] - magnitude
    code = left if low < high or (low == high and left % 2 == 0) else right
    return math.copysign(float(_GRID[code]), value)


def e2m1(value: float) -> float:
    """Nearest e2m1 value, ties to the even code, clamped to 6."""
    magnitude = min(abs(value), 6.0)
    code = min(range(8), key=lambda c: (abs(E2M1[c] - magnitude), c % 2))
    return math.copysign(E2M1[code], value)


def fq8(row: Tensor, block: int = 64) -> Tensor:
    """FQ8 of one f64 row."""
    out = []
    for part in row.to(torch.float64).split(block):
        amax = max(float(part.abs().max()), 1e-4)
        scale = ceil_pow2(float(np.float32(amax) * np.float32(1 / 448)))
        out += [e4m3(float(v) / scale) * scale for v in part]
    return torch.tensor(out, dtype=torch.float64)


def fq4(row: Tensor, block: int = 32) -> Tensor:
    """FQ4 of one f64 row."""
    out = []
    for part in row.to(torch.float64).split(block):
        amax = max(float(part.abs().max()), 6 * 2.0**-126)
        scale = ceil_pow2(float(np.float32(amax) * np.float32(1 / 6)))
        out += [e2m1(float(v) / scale) * scale for v in part]
    return torch.tensor(out, dtype=torch.float64)


def hadamard64(row: Tensor) -> Tensor:
    """Sylvester rotation of one row by its sign formula."""
    n = row.shape[0]
    signs = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], dtype=torch.float64
    )
    return row.to(torch.float64) @ signs / math.sqrt(n)


def latent_layout(
    dtype: CacheDtype, head_dim: int, entries_per_page: int, rope: int = 64
) -> PageLayout:
    """Layout of latent entries."""
    return PageLayout(
        kind=EntryKind.LATENT,
        dtype=dtype,
        head_dim=head_dim,
        rope_dim=rope,
        entries_per_page=entries_per_page,
    )


def index_layout(dtype: CacheDtype, head_dim: int, entries_per_page: int) -> PageLayout:
    """Layout of index entries."""
    return PageLayout(
        kind=EntryKind.INDEX,
        dtype=dtype,
        head_dim=head_dim,
        rope_dim=0,
        entries_per_page=entries_per_page,
    )


def poisoned_pool(layout: PageLayout, pages: int) -> Tensor:
    """A pool whose every entry decodes to NaN until it is stored."""
    return torch.full((pages, layout.page_bytes), 0xFF, dtype=torch.uint8)


def column_slice(x: Tensor, before: int = 5, after: int = 3) -> Tensor:
    """The same values as columns of a wider tensor whose other columns are NaN."""
    wide = torch.full((*x.shape[:-1], before + x.shape[-1] + after), float("nan"), dtype=x.dtype)
    wide[..., before : before + x.shape[-1]] = x
    return wide[..., before : before + x.shape[-1]]


def report(name: str, run: Callable[[], object], repeats: int = 5) -> None:
    """Print the best time of a benchmark case."""
    run()
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    print(f"\n{name}: {best * 1e3:.2f} ms")
