"""Contract checks shared by all ops: one error type, one message form."""

from __future__ import annotations

import torch
from torch import Tensor


class KernelContractError(ValueError):
    """An op was called with arguments its contract forbids; nothing was computed."""


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    beside: Tensor | None = None,
) -> None:
    """Check one tensor argument of an op.

    Args:
        name: op and argument, as ``"linear: x"``.
        tensor: the argument.
        shape: expected sizes; None inside the tuple allows any size, ``shape=None`` any shape.
        dtype: the dtype, or the dtypes, that are allowed. Where float32 is, float64 is too: the
            references then compute everything in float64 (``kernels.numerics.widen``).
        device: the device it must be on (the index counts only when ``device`` has one).
        beside: the op's first tensor, where this is another one: its device is this one's, and only
            beside float64 may this one be float64 instead of float32.

    The last dimension must be contiguous (stride 1) unless it has at most one element; leading
    strides are free.

    Raises:
        KernelContractError: names the op argument, what is expected and what was passed.
    """
    # Some hundred checks a layer run on the host while the device waits: what holds is found first.
    if not isinstance(tensor, Tensor):
        raise KernelContractError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if shape is not None and not _shape_matches(tensor.shape, shape):
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelContractError(f"{name}: expected shape [{want}], got {list(tensor.shape)}")
    if dtype is not None and tensor.dtype is not dtype:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in allowed:
            if torch.float32 in allowed and (beside is None or beside.dtype is torch.float64):
                allowed = (*allowed, torch.float64)
            if tensor.dtype not in allowed:
                want = " or ".join(str(d).removeprefix("torch.") for d in allowed)
                got = str(tensor.dtype).removeprefix("torch.")
                raise KernelContractError(f"{name}: expected dtype {want}, got {got}")
    if beside is not None:
        device = beside.device
    if device is not None and tensor.device != device and not _same_device(tensor.device, device):
        raise KernelContractError(f"{name}: expected device {device}, got {tensor.device}")
    strides = tensor.stride()
    # A tensor without elements has no memory whose order could matter.
    if strides and strides[-1] != 1 and tensor.numel() and tensor.shape[-1] > 1:
        raise KernelContractError(
            f"{name}: expected a contiguous last dimension (stride 1), got strides"
            f" {list(strides)} for shape {list(tensor.shape)}"
        )


def _shape_matches(got: torch.Size, want: tuple[int | None, ...]) -> bool:
    if len(got) != len(want):
        return False
    for size, wanted in zip(got, want, strict=True):  # noqa: SIM110 (half the time of all(..))
        if wanted is not None and size != wanted:
            return False
    return True


def _same_device(got: torch.device, want: torch.device) -> bool:
    return got.type == want.type and (want.index is None or got.index == want.index)
