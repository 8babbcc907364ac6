"""Decode metadata in flat, preallocated 1-D device buffers, viewed to shape for each step.

A two-dimensional slice of a larger buffer is not contiguous, and ``.contiguous()`` allocates (vLLM
#42135). A prefix of a flat buffer viewed to shape is both dense and free.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.int64: np.int64, torch.int32: np.int32}


class MetadataBuffers:
    """Named flat buffers.

    Args:
        sizes: name -> (most elements, dtype).
        device: where the buffers live; host copies are pinned when it is CUDA. Copies are synchronous: the
            host side is free for the next step when ``fill`` returns.
    """

    def __init__(self, sizes: dict[str, tuple[int, torch.dtype]], device: torch.device) -> None:
        pin = device.type == "cuda"
        self._host = {
            name: torch.empty(size, dtype=dtype, pin_memory=pin)
            for name, (size, dtype) in sizes.items()
        }
        self._device = {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in sizes.items()
        }

    def fill(self, name: str, values: np.ndarray) -> Tensor:
        """Copy ``values`` to the start of a buffer and return that part, viewed to its shape.

        Raises:
            ValueError: more values than the buffer holds.
        """
        host, device = self._host[name], self._device[name]
        count = values.size
        if count > host.numel():
            raise ValueError(f"{name}: {count} values, the buffer holds {host.numel()}")
        flat = np.ascontiguousarray(values, dtype=_NUMPY[host.dtype]).reshape(-1)
        host.numpy()[:count] = flat
        device[:count].copy_(host[:count])
        return device[:count].view(values.shape)
