"""Collectives of one rank group: row counts instead of shapes, any dtype, bytes counted.

Data that is only moved travels as bytes, so float8, bfloat16 and uint8 work on gloo and NCCL alike.
A group of one rank is the identity and never calls torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.peer_memory import PeerReducer

# torch 2.13 renamed these two; older releases have the second name only.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(slots=True)
class CommStats:
    """Bytes this rank has moved in one group, padding included, once per receiver or sender.

    A reduction is counted as a ring moves it: ``(size - 1) / size`` of the buffer for each of its
    halves (reduce-scatter, all-gather).
    """

    calls: int = 0
    sent: int = 0
    received: int = 0

    def add(self, sent: int, received: int) -> None:
        """Count one call."""
        self.calls += 1
        self.sent += sent
        self.received += received

    def reset(self) -> None:
        """Start again from zero."""
        self.calls = self.sent = self.received = 0


class Group:
    """Ranks that communicate. Every rank of the group makes the same calls in the same order.

    Args:
        process_group: of torch.distributed; may be None only with ``size`` 1.
        size: ranks in the group.
        rank: this rank's index in the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, size: int, rank: int) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"group rank {rank}, allowed: 0 .. {size - 1}")
        if size > 1 and process_group is None:
            raise ValueError(f"a group of {size} ranks needs a process group")
        self.process_group, self.size, self.rank = process_group, size, rank
        self.peers: PeerReducer | None = None  # set where small sums have a faster way
        self.stats = CommStats()

    def __repr__(self) -> str:
        return f"Group(size={self.size}, rank={self.rank})"

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows [n, ...] of every rank, the same n on each -> [size * n, ...], rank-major."""
        return self.all_gather_v(x, [x.shape[0]] * self.size)

    def all_gather_v(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows [counts[rank], ...] of every rank -> [sum(counts), ...], rank-major, unpadded.

        Shorter ranks are padded for the transfer; with no rows anywhere nothing is called.

        Raises:
            ValueError: ``counts`` has another length than the group, or x another row count.
        """
        self._check_counts("counts", counts)
        if x.shape[0] != counts[self.rank]:
            raise ValueError(f"x has {x.shape[0]} rows, counts[{self.rank}] is {counts[self.rank]}")
        if self.size == 1:
            return x
        width, row_shape, longest = _row_bytes(x), x.shape[1:], max(counts)
        if longest * width == 0:
            return x.new_empty(sum(counts), *row_shape)
        sent = _as_bytes(x)
        if x.shape[0] < longest:
            sent = torch.cat([sent, sent.new_zeros((longest - x.shape[0]) * width)])
        out = sent.new_empty(self.size * longest * width)
        _all_gather_single(out, sent, group=self.process_group)
        moved = (self.size - 1) * longest * width
        self.stats.add(moved, moved)
        if sum(counts) != self.size * longest:
            parts = zip(out.view(self.size, -1), counts, strict=True)
            out = torch.cat([part[: count * width] for part, count in parts])
        return out.view(x.dtype).view(sum(counts), *row_shape)

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Reduce x over the group in place and return it; all ranks get the same bits."""
        if self.size == 1 or x.numel() == 0:
            return x
        packed = x.contiguous()
        if op == "sum" and self.peers is not None and self.peers.takes(packed):
            self.peers.all_reduce(packed)
        else:
            dist.all_reduce(packed, op=_OPS[op], group=self.process_group)
        if packed is not x:
            x.copy_(packed)
        moved = 2 * (packed.numel() * packed.element_size() * (self.size - 1) // self.size)
        self.stats.add(moved, moved)
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum rows [size * n, ...] over the group -> this rank's [n, ...]."""
        if x.shape[0] % self.size:
            raise ValueError(f"{x.shape[0]} rows do not divide by the group's {self.size} ranks")
        if self.size == 1 or x.numel() == 0:
            return x[: x.shape[0] // self.size]
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        _reduce_scatter_single(out, x.contiguous(), group=self.process_group)
        moved = (self.size - 1) * out.numel() * out.element_size()
        self.stats.add(moved, moved)
        return out

    def all_to_all_v(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Tensor:
        """Send the first send_counts[0] rows to rank 0, the next to rank 1, ...

        Args:
            x: [sum(send_counts), ...], ordered by destination.
            recv_counts: rows each rank sends to this one; they must agree with the senders'.

        Returns:
            [sum(recv_counts), ...], ordered by source.

        Raises:
            ValueError: counts of another length than the group, or x another row count.
        """
        self._check_counts("send_counts", send_counts)
        self._check_counts("recv_counts", recv_counts)
        if x.shape[0] != sum(send_counts):
            raise ValueError(f"x has {x.shape[0]} rows, send_counts add up to {sum(send_counts)}")
        if self.size == 1:
            return x
        width = _row_bytes(x)
        if width == 0:
            return x.new_empty(sum(recv_counts), *x.shape[1:])
        out = torch.empty(sum(recv_counts) * width, dtype=torch.uint8, device=x.device)
        splits_in = [count * width for count in send_counts]
        splits_out = [count * width for count in recv_counts]
        dist.all_to_all_single(out, _as_bytes(x), splits_out, splits_in, group=self.process_group)
        self.stats.add(
            sum(splits_in) - splits_in[self.rank], sum(splits_out) - splits_out[self.rank]
        )
        return out.view(x.dtype).view(sum(recv_counts), *x.shape[1:])

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """Overwrite x, of one shape and dtype on all ranks, with that of group rank ``src``."""
        if not 0 <= src < self.size:
            raise ValueError(f"src = {src}, allowed: 0 .. {self.size - 1}")
        if self.size == 1 or x.numel() == 0:
            return x
        packed = _as_bytes(x)
        dist.broadcast(packed, group=self.process_group, group_src=src)
        if not x.is_contiguous():
            x.copy_(packed.view(x.dtype).view(x.shape))
        moved = packed.numel()
        if self.rank == src:
            self.stats.add((self.size - 1) * moved, 0)
        else:
            self.stats.add(0, moved)
        return x

    def barrier(self) -> None:
        """Return when every rank of the group is here."""
        if self.size > 1:
            dist.barrier(group=self.process_group)

    def _check_counts(self, name: str, counts: Sequence[int]) -> None:
        if len(counts) != self.size or min(counts) < 0:
            raise ValueError(f"{name} = {list(counts)}, allowed: {self.size} counts >= 0")


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _as_bytes(x: Tensor) -> Tensor:
    """The values as a flat uint8 tensor; shares memory when x is contiguous."""
    return x.contiguous().view(-1).view(torch.uint8)
