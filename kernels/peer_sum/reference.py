"""Torch twin of ``peer_sum``: the same words in the same boxes, between threads of one process."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from kernels.peer_sum.api import BLOCKS, WORDS, PeerBoxes

_PATIENCE_S = 60.0


def peer_sum(x: Tensor, peers: PeerBoxes) -> None:
    """See ``kernels.peer_sum.api.peer_sum``; ranks are threads, and give up after a minute.

    Raises:
        TimeoutError: another rank left nothing.
    """
    size = len(peers.boxes)
    pairs = x.view(-1, 2)
    word = torch.arange(pairs.shape[0])
    part, slot = word // WORDS, word % WORDS
    tag = peers.rounds.long()[part] + 1
    # [round's parity, sender, part, word, first or second value, value or tag]
    boxes = [box.view(torch.int32).view(2, size, BLOCKS, WORDS, 2, 2) for box in peers.boxes]
    for box in boxes:
        here = (tag % 2, torch.tensor(peers.rank), part, slot)
        box[(*here, slice(None), 0)] = pairs.view(torch.int32)
        box[(*here, slice(None), 1)] = tag.to(torch.int32)[:, None].expand(-1, 2)
    total = torch.zeros_like(pairs)
    deadline = time.monotonic() + _PATIENCE_S
    for source in range(size):
        there = (tag % 2, torch.tensor(source), part, slot)
        while not (boxes[peers.rank][there][:, :, 1] == tag[:, None]).all():
            if time.monotonic() > deadline:
                raise TimeoutError(f"peer_sum: rank {source} left nothing")
            time.sleep(1e-4)
        values = boxes[peers.rank][there][:, :, 0].contiguous().view(torch.float32)
        total = values if source == 0 else total + values
    pairs.copy_(total)
    peers.rounds[: int(part[-1]) + 1] += 1
