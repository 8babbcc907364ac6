"""Sizes and choices of the parallel mesh; no live groups here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """``parallel.*``. One world holds ``cp * tp`` ranks, ``rank = cp_rank * tp + tp_rank``.

    With ``kv_shard: cp`` the main CSA and HCA pages of block id ``b`` live on cp rank ``b % cp`` as
    local page ``b // cp``; block ``i`` of a request takes an id with ``id % cp == i % cp``. Indexer
    keys, windows and states are on every rank.
    """

    cp: int = 1
    tp: int = 1
    cp_gather: Literal["kv_bf16", "compressed"] = "compressed"
    kv_shard: Literal["replicate", "cp"] = "replicate"
    cp_min_tokens: int = 1024  # shorter chunks go whole to one rank
    moe_combine: Literal["fast", "ordered"] = "fast"
    peer_memory: bool = True  # small sums between the GPUs of one machine bypass NCCL
    dcp: bool = False  # decode: split index scoring over the ranks

    @property
    def world(self) -> int:
        """Ranks in the mesh."""
        return self.cp * self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshCoord:
    """Where one rank sits in the mesh."""

    cp: int
    tp: int
    rank: int

    @property
    def world(self) -> int:
        """Ranks in the mesh."""
        return self.cp * self.tp

    @property
    def cp_rank(self) -> int:
        """Coordinate on the cp axis."""
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        """Coordinate on the tp axis."""
        return self.rank % self.tp

    @property
    def decode_slice(self) -> int:
        """Which world-th of heads and groups this rank decodes: it lies inside its tp slice."""
        return self.tp_rank * self.cp + self.cp_rank


def adds_up(world: int, combine: str) -> bool:
    """Whether experts' results of replicated rows end in one sum over ranks, with room for parts."""
    return world > 1 and combine == "fast"


# Share of all rows that a rank's experts need, from which on every rank gets all rows (``fast``).
# Sending everything costs 1/share of the bytes, choosing costs a wait for the host in every layer.
GATHER_FROM = 0.5


def share_of_rows(world: int, choices: int) -> float:
    """Share of all rows that one rank of a world needs, with ``choices`` experts a row, evenly routed."""
    return 1 - (1 - 1 / world) ** choices
