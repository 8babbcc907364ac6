"""Gumbel noise: the twin's integer hash, bit for bit, and its float64 logarithms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

_WEYL = tl.constexpr(0x9E3779B97F4A7C15)
_STEP = tl.constexpr(0xD1342543DE82EF95)
_MUL_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MUL_2 = tl.constexpr(0x94D049BB133111EB)
_COLUMNS = 1024


@triton.jit
def _u64(value: tl.constexpr):
    return tl.full((), value, tl.uint64)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _u64(_MUL_1)
    x = (x ^ (x >> 27)) * _u64(_MUL_2)
    return x ^ (x >> 31)


@triton.jit(do_not_specialize_on_alignment=["seeds", "steps"])
def _gumbel(seeds, steps, out, vocab, P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    step = tl.load(steps + row).to(tl.uint64, bitcast=True)
    key = _mix(_mix(seed + _u64(_WEYL)) ^ (step * _u64(_STEP)))
    col = tl.program_id(1) * P + tl.arange(0, P)
    bits = _mix(key + (col + 1).to(tl.uint64) * _u64(_WEYL)) >> 12
    half = tl.full((), 0.5, tl.float64)
    unit = tl.full((), 2.0**-52, tl.float64)
    u = (bits.to(tl.int64).to(tl.float64) + half) * unit
    noise = -libdevice.log(-libdevice.log(u))
    tl.store(out + row * vocab + col, noise.to(tl.float32), mask=col < vocab)


def gumbel_noise(seeds: Tensor, steps: Tensor, vocab: int, device: torch.device) -> Tensor:
    """See ``kernels.gumbel.api.gumbel_noise``."""
    seeds, steps = seeds.to(device).contiguous(), steps.to(device).contiguous()
    out = torch.empty((seeds.shape[0], vocab), dtype=torch.float32, device=device)
    if out.numel():
        _gumbel[(seeds.shape[0], triton.cdiv(vocab, _COLUMNS))](
            seeds, steps, out, vocab, P=_COLUMNS, num_warps=4
        )
    return out
