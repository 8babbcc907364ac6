"""The mesh and the cut as text: who is which rank, what it holds, which tokens it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.deepseek_v4.config import DeepSeekV4Config
from model.parallel.config import MeshCoord, ParallelConfig
from model.parallel.partition import Chunk, cut

_WIDTH = 64  # characters of the drawn sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """What one rank holds; ranges are ``(start, stop)``, stop exclusive.

    ``decode_heads`` and ``decode_groups`` are the slices it decodes with: a world-th of the model
    where heads and output groups divide by the world, else its tp slice.
    """

    rank: int
    cp_rank: int
    tp_rank: int
    heads: tuple[int, int]
    groups: tuple[int, int]
    decode_heads: tuple[int, int]
    decode_groups: tuple[int, int]
    experts: tuple[int, int]


def decode_slices(config: DeepSeekV4Config, parallel: ParallelConfig) -> int:
    """Into how many slices decode cuts heads and groups: the world where both divide, else tp."""
    world = parallel.world
    whole = config.num_attention_heads % world == 0 and config.o_groups % world == 0
    return world if whole else parallel.tp


def rank_views(config: DeepSeekV4Config, parallel: ParallelConfig) -> list[RankView]:
    """One view per rank, in rank order. The mesh must fit the shape (``check_mesh``)."""
    heads, groups, experts = config.num_attention_heads, config.o_groups, config.n_routed_experts
    slices = decode_slices(config, parallel)
    views = []
    for rank in range(parallel.world):
        coord = MeshCoord(cp=parallel.cp, tp=parallel.tp, rank=rank)
        decode = coord.decode_slice if slices == parallel.world else coord.tp_rank
        views.append(
            RankView(
                rank=rank,
                cp_rank=coord.cp_rank,
                tp_rank=coord.tp_rank,
                heads=_share(heads, parallel.tp, coord.tp_rank),
                groups=_share(groups, parallel.tp, coord.tp_rank),
                decode_heads=_share(heads, slices, decode),
                decode_groups=_share(groups, slices, decode),
                experts=_share(experts, parallel.world, rank),
            )
        )
    return views


def _share(count: int, parts: int, index: int) -> tuple[int, int]:
    each = count // parts
    return index * each, (index + 1) * each


def span(bounds: tuple[int, int]) -> str:
    """``(0, 4)`` as ``0..3``; an empty range as ``-``."""
    start, stop = bounds
    if start >= stop:
        return "-"
    return f"{start}..{stop - 1}" if stop - start > 1 else str(start)


def mesh_picture(parallel: ParallelConfig) -> str:
    """The ranks as a grid: cp down, tp across."""
    cells = max(len(f"rank {parallel.world - 1}"), len(f"tp {parallel.tp - 1}")) + 2
    rule = "       +" + ("-" * cells + "+") * parallel.tp
    lines = ["        " + " ".join(f"tp {t}".center(cells) for t in range(parallel.tp)), rule]
    for c in range(parallel.cp):
        ranks = [f"rank {c * parallel.tp + t}".center(cells) for t in range(parallel.tp)]
        lines += [f"cp {c}".rjust(6) + " |" + "|".join(ranks) + "|", rule]
    return "\n".join(line.rstrip() for line in lines)


def cut_picture(chunks: Sequence[Chunk], parallel: ParallelConfig) -> str:
    """Which cp rank computes which tokens of each chunk: one line drawn to scale, then the ranges."""
    segments = cut(chunks, parallel.cp, parallel.cp_min_tokens)
    lines = []
    for request, chunk in enumerate(chunks):
        pieces = sorted(
            (s.start, s.end, rank)
            for rank, part in enumerate(segments)
            for s in part
            if s.request == request
        )
        drawn = ""
        for _, end, rank in pieces:
            room = round((end - chunk.start) * _WIDTH / (chunk.end - chunk.start)) - len(drawn)
            drawn += f"{rank}" * max(1, room - 1) + "|"
        lines.append(f"request {request}, tokens {chunk.start}..{chunk.end - 1}")
        lines.append(f"  |{drawn}")
        for rank in range(parallel.cp):
            own = [f"{start}..{end - 1}" for start, end, owner in pieces if owner == rank]
            lines.append(f"  cp {rank}: {', '.join(own) or 'nothing'}")
    return "\n".join(lines)
