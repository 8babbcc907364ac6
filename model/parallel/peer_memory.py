"""Sums of small tensors through memory that the GPUs of one machine map from each other.

NCCL needs some 20 us for a few kilobytes; reading the other ranks' buffers directly takes half of
that. Every rank adds in ascending rank, so all ranks get the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

_ALIGN = 16  # bytes that a rank reads at once


class PeerMemoryError(RuntimeError):
    """The ranks cannot map each other's memory."""


class PeerReducer:
    """Adds tensors over a process group. Making one is a collective.

    Args:
        process_group: ranks of one machine, one GPU each.
        device: this rank's GPU.
        nbytes: largest tensor.

    Raises:
        PeerMemoryError: names the way out.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        self.nbytes, self._name = nbytes, process_group.group_name
        try:
            self._buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
            # The handle keeps the peers' mappings alive.
            self._handle = symmetric_memory.rendezvous(self._buffer, process_group)
        except RuntimeError as error:
            raise PeerMemoryError(
                f"the GPUs cannot map each other's memory ({error}); parallel.peer_memory: false"
                " leaves all sums to NCCL"
            ) from error

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is a tensor for this path."""
        size = x.numel() * x.element_size()
        floats = x.dtype in (torch.float32, torch.bfloat16)
        return floats and x.is_contiguous() and size <= self.nbytes and size % _ALIGN == 0

    def all_reduce(self, x: Tensor) -> None:
        """``x`` becomes the sum over the ranks."""
        flat = x.view(-1)
        place = self._buffer[: flat.numel() * flat.element_size()].view(x.dtype)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(place, flat, "sum", self._name, flat)
