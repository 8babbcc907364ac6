"""What the GPU tests share: where they run, how near to the twin is near enough, row independence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda")


class Implementation:
    """A module of GPU kernels, imported at first use: its file is collected on machines without one."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


def there(value: Any) -> Any:
    """Tensors, also inside tuples and lists, on the GPU with the strides they have."""
    if isinstance(value, Tensor):
        if value.device == DEVICE:
            return value
        size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        if value.numel() == 0 or value.is_contiguous():
            return value.to(DEVICE)
        # The values between the rows travel too: a kernel that reads them meets the NaN there.
        flat = value.as_strided((size,), (1,), value.storage_offset())
        return flat.to(DEVICE).as_strided(value.shape, value.stride(), 0)
    if isinstance(value, list | tuple):
        return type(value)(there(item) for item in value)
    return value


def norm_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|`` in float64; NaN counts as infinite."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def assert_near(got: Tensor, want: Tensor, *, bound: float, unequal: float = 1.0) -> None:
    """Norm-wise within ``bound``, and at most a share ``unequal`` of the elements differ at all."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.numel() == 0:
        return
    assert torch.isfinite(got.float()).all()
    error = norm_error(got, want)
    assert error <= bound, f"error {error}, allowed {bound}"
    share = float((got.cpu() != want.cpu()).float().mean())
    assert share <= unequal, f"{share} of the elements differ, allowed {unequal}"


def bounds(dtype: torch.dtype) -> dict[str, float]:
    """Of results whose sums run in another order than the twin's: f32 ulps, or rare bf16 ulps."""
    if dtype is torch.float32:
        return {"bound": 2e-6}
    return {"bound": 5e-4, "unequal": 5e-3}


def assert_rows_alone(run: Callable[[slice], Tensor], result: Tensor, rows: list[int]) -> None:
    """A row computed alone has the bits it has among others."""
    for row in rows:
        alone = run(slice(row, row + 1))
        assert torch.equal(alone[0].cpu(), result[row].cpu()), f"row {row}"
