"""Sums of small tensors through memory that the GPUs of one machine map from each other.

NCCL needs some 20 us for a few kilobytes; writing or reading the other ranks' memory directly takes less
than half of that. Every rank adds in ascending rank, so all ranks get the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from kernels import PeerBoxes, box_bytes, peer_sum
from kernels.dispatch import own
from kernels.peer_sum.api import BLOCKS, CAPACITY, MOST_RANKS

_ALIGN = 16  # bytes that a rank reads at once


class PeerMemoryError(RuntimeError):
    """The ranks cannot map each other's memory."""


class PeerReducer:
    """Adds tensors over a process group. Making one is a collective.

    Up to ``CAPACITY`` float32 values are pushed to the other ranks with tags (``peer_sum``); larger ones,
    and bfloat16, are read from a buffer of each rank between two barriers.

    Args:
        process_group: ranks of one machine, one GPU each.
        device: this rank's GPU.
        nbytes: largest tensor.

    Raises:
        PeerMemoryError: names the way out.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        self.nbytes, self._name = nbytes, process_group.group_name
        size = process_group.size()
        self._peers: PeerBoxes | None = None
        try:
            self._buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
            # The handles keep the peers' mappings alive.
            self._handle = symmetric_memory.rendezvous(self._buffer, process_group)
            if size <= MOST_RANKS and own("peer_sum", device).name != "reference":
                room = box_bytes(size)
                mine = symmetric_memory.empty(room, dtype=torch.uint8, device=device).zero_()
                self._boxes = symmetric_memory.rendezvous(mine, process_group)
                self._peers = PeerBoxes(
                    boxes=tuple(
                        self._boxes.get_buffer(rank, (room,), torch.uint8) for rank in range(size)
                    ),
                    rank=self._boxes.rank,
                    rounds=torch.zeros(BLOCKS, dtype=torch.int32, device=device),
                )
        except RuntimeError as error:
            raise PeerMemoryError(
                f"the GPUs cannot map each other's memory ({error}); parallel.peer_memory: false"
                " leaves all sums to NCCL"
            ) from error
        # Nobody sends before every box is empty.
        dist.barrier(process_group)

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is a tensor for this path."""
        size = x.numel() * x.element_size()
        floats = x.dtype in (torch.float32, torch.bfloat16)
        return floats and x.is_contiguous() and size <= self.nbytes and size % _ALIGN == 0

    def all_reduce(self, x: Tensor) -> None:
        """``x`` becomes the sum over the ranks."""
        if self._peers is not None and x.dtype == torch.float32 and x.numel() <= CAPACITY:
            # All ranks must take one road, so an address may decide about a copy only.
            aligned = x if x.data_ptr() % 8 == 0 else x.clone()
            peer_sum(aligned, self._peers)
            if aligned is not x:
                x.copy_(aligned)
            return
        flat = x.view(-1)
        place = self._buffer[: flat.numel() * flat.element_size()].view(x.dtype)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(place, flat, "sum", self._name, flat)
