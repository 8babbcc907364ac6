"""Inputs as ops meet them: column slices of wider tensors whose other columns must not be read."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


def column_slice(x: Tensor, left: int = 3, right: int = 5) -> Tensor:
    """A view equal to ``x`` whose rows lie apart; the columns around it are NaN."""
    wide = torch.full(
        (*x.shape[:-1], left + x.shape[-1] + right), float("nan"), dtype=torch.float32
    ).to(x.dtype)
    view = wide[..., left : left + x.shape[-1]]
    view.copy_(x)
    return view


def microseconds(run: Callable[[], object], repeat: int = 20) -> float:
    """Median time of a call, after one warm-up call."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2] * 1e6
