"""``peer_sum``: every rank leaves its values, each with a tag, in a box of every other, and adds up.

A word of a box holds a value and the number of the round it belongs to, and is written at once: a
reader that sees the tag has the value, so a sum takes one trip between the ranks and no barrier. The
boxes of a round are used again two rounds later. By then every rank has read them: it had to, before
it sent the round between, which the writer has received. Round numbers have 32 bits; after four billion
sums one of them is zero, as are words that were never written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel

BLOCKS = 132  # parts of a sum that advance on their own, each with a box of its own
WORDS = 256  # words of two values in a part's box; threads of a block on a GPU
MOST_RANKS = 8
CAPACITY = BLOCKS * WORDS * 2  # values of the largest sum


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerBoxes:
    """The boxes of all ranks, as one rank sees them.

    Args:
        boxes: uint8 [``box_bytes(size)``] of every rank in ascending order, each at this rank's
            address; all zero before the first sum of any rank.
        rank: this one.
        rounds: int32 [BLOCKS], zero before the first sum: sums that each part has made here.
    """

    boxes: tuple[Tensor, ...]
    rank: int
    rounds: Tensor


def box_bytes(size: int) -> int:
    """Bytes of one rank's boxes, for two rounds of ``size`` senders."""
    return 2 * size * BLOCKS * WORDS * 16


def peer_sum(x: Tensor, peers: PeerBoxes) -> Tensor:
    """Sum ``x`` over the ranks, in ascending order of rank: all get the same bits.

    Every rank makes the same calls, with as many values, in one order and on one stream.

    Args:
        x: float32, contiguous, an even number of values, at most ``CAPACITY``; becomes the sum.
        peers: the boxes.

    Returns:
        ``x``.

    Raises:
        KernelContractError: x or the boxes are not as described.
    """
    if x.dtype != torch.float32:  # wider values do not fit beside a tag
        raise KernelContractError(f"peer_sum: x: expected float32, got {x.dtype}")
    check_tensor("peer_sum: x", x, shape=(None,) * x.dim())
    if not x.is_contiguous() or x.numel() % 2 or x.numel() > CAPACITY or x.data_ptr() % 8:
        raise KernelContractError(
            f"peer_sum: x: expected an even number of values up to {CAPACITY}, contiguous and"
            f" aligned to 8 bytes, got {list(x.shape)} with strides {list(x.stride())}"
        )
    size = len(peers.boxes)
    if not 2 <= size <= MOST_RANKS or not 0 <= peers.rank < size:
        raise KernelContractError(
            f"peer_sum: expected 2..{MOST_RANKS} boxes, got {size}, rank {peers.rank}"
        )
    for box in peers.boxes:
        shape = (box_bytes(size),)
        check_tensor("peer_sum: box", box, shape=shape, dtype=torch.uint8)
    check_tensor("peer_sum: rounds", peers.rounds, shape=(BLOCKS,), dtype=torch.int32, beside=x)
    if x.numel():
        kernel("peer_sum", x.device)(x, peers)
    return x
