"""Metadata of a decode step: staged in pinned memory, sent to the device in one copy.

Arrays lie one behind the other, so where each one lies depends on the shapes of the step alone: a
CUDA graph captured for these shapes finds the next step's values at the same addresses. An array is
dense whatever its shape: a two-dimensional slice of a larger buffer would not be, and
``.contiguous()`` would allocate (vLLM #42135).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}
_ALIGN = 16  # bytes between the starts of arrays: vector loads stay aligned


class MetadataBuffers:
    """One staging buffer on the host and its twin on the device.

    Args:
        nbytes: room; ``aligned_bytes`` of every array of the largest step, added up.
        device: where the twin lives; the host side is pinned when it is CUDA.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._copied = torch.Event(device) if device.type == "cuda" else None
        self._used = 0

    def begin(self) -> None:
        """Start a step; waits until the last step's copy has left the host side."""
        if self._copied is not None:
            self._copied.synchronize()
        self._used = 0

    def put(self, values: np.ndarray) -> Tensor:
        """Stage int64 or int32 values; the device tensor of their shape holds them after ``commit``.

        Raises:
            ValueError: another dtype, or more values than there is room for.
        """
        dtype = _DTYPES.get(values.dtype)
        if dtype is None:
            raise ValueError(f"metadata of dtype {values.dtype}, allowed: int64, int32")
        start, stop = self._used, self._used + values.nbytes
        if stop > self._host.numel():
            raise ValueError(
                f"{values.nbytes} bytes of metadata after {start}, the buffer holds"
                f" {self._host.numel()}"
            )
        place = self._host.numpy()[start:stop].view(values.dtype).reshape(values.shape)
        place[...] = values
        self._used = start + aligned_bytes(values.nbytes)
        return self._device[start:stop].view(dtype).view(values.shape)

    def commit(self) -> None:
        """Send everything staged since ``begin``; work queued behind it on this stream sees it."""
        used = min(self._used, self._host.numel())
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def aligned_bytes(nbytes: int) -> int:
    """What an array of ``nbytes`` takes in the buffer."""
    return -(-nbytes // _ALIGN) * _ALIGN
