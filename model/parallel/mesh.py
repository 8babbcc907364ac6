"""The live mesh: this rank's place and the groups it talks in."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from model.parallel.collectives import Group
from model.parallel.config import MeshCoord, ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView:
    """Which heads and output groups a rank computes in decode, and who adds up the results.

    Attributes:
        over_world: the slices are 1/world of the model; False: the whole tp slice, computed
            redundantly by all cp ranks.
        heads: (start, stop) inside the rank's tp slice of heads.
        groups: (start, stop) inside the rank's tp slice of output groups.
        group: the ranks whose partial outputs add up to the whole.
    """

    over_world: bool
    heads: tuple[int, int]
    groups: tuple[int, int]
    group: Group


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMesh:
    """One rank's coordinate and groups; group ranks are cp_rank, tp_rank and the world rank."""

    coord: MeshCoord
    cp: Group
    tp: Group
    world: Group

    @classmethod
    def single(cls) -> ParallelMesh:
        """The mesh of one rank; needs no torch.distributed."""
        one = MeshCoord(cp=1, tp=1, rank=0)
        return cls(coord=one, cp=Group(None, 1, 0), tp=Group(None, 1, 0), world=Group(None, 1, 0))

    def decode_view(self, num_heads: int, num_groups: int) -> DecodeView:
        """Slice attention for decode: over the world where heads and groups divide by it, else tp.

        Args:
            num_heads, num_groups: attention heads and output groups of the whole model.

        Raises:
            ValueError: they do not divide by tp.
        """
        tp, world = self.coord.tp, self.coord.world
        if num_heads % tp or num_groups % tp:
            raise ValueError(
                f"{num_heads} attention heads and {num_groups} output groups"
                f" must divide by tp = {tp}"
            )
        over_world = num_heads % world == 0 and num_groups % world == 0
        # decode_slice = tp_rank * cp + cp_rank: inside the tp slice that is part cp_rank of cp.
        parts, part = (self.coord.cp, self.coord.cp_rank) if over_world else (1, 0)
        heads, groups = num_heads // tp // parts, num_groups // tp // parts
        return DecodeView(
            over_world=over_world,
            heads=(part * heads, (part + 1) * heads),
            groups=(part * groups, (part + 1) * groups),
            group=self.world if over_world else self.tp,
        )


def build_mesh(parallel: ParallelConfig, rank: int) -> ParallelMesh:
    """Make the groups of one rank, after ``init_process_group``; every rank calls it.

    Raises:
        ValueError: sizes below 1, a rank outside the world, or a process group of another size.
    """
    cp, tp, world = parallel.cp, parallel.tp, parallel.world
    if cp < 1 or tp < 1:
        raise ValueError(f"parallel.cp = {cp}, parallel.tp = {tp}, allowed: at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank}, allowed: 0 .. {world - 1} (cp {cp} x tp {tp})")
    if world == 1:
        return ParallelMesh.single()
    if not dist.is_initialized() or dist.get_world_size() != world:
        found = dist.get_world_size() if dist.is_initialized() else "no"
        raise ValueError(f"cp {cp} x tp {tp} needs {world} ranks, torch.distributed has {found}")
    coord = MeshCoord(cp=cp, tp=tp, rank=rank)
    # Creating a group is a collective: all ranks create all groups, in this order.
    over_cp = [_subgroup([c * tp + t for c in range(cp)], world) for t in range(tp)]
    over_tp = [_subgroup([c * tp + t for t in range(tp)], world) for c in range(cp)]
    return ParallelMesh(
        coord=coord,
        cp=Group(over_cp[coord.tp_rank], cp, coord.cp_rank),
        tp=Group(over_tp[coord.cp_rank], tp, coord.tp_rank),
        world=Group(dist.group.WORLD, world, rank),
    )


def _subgroup(ranks: list[int], world: int) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == world:
        return dist.group.WORLD
    group: dist.ProcessGroup = dist.new_group(ranks)
    return group
