"""Bytes that a prefill step moves between ranks, inside nodes and between them: counted, not measured.

Uses the same partition as the ranks do, so the numbers are those that the collectives are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model.cache_spec import CacheSpec
from model.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config
from model.parallel.config import GATHER_FROM, ParallelConfig, share_of_rows
from model.parallel.partition import (
    Chunk,
    Segments,
    cut,
    entry_plan,
    group_wants,
    plan_rows,
    window_wants,
)

Gather = Literal["kv_bf16", "compressed"]
GATHERS: tuple[Gather, ...] = ("kv_bf16", "compressed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one chunk through the whole model, summed over all receivers."""

    name: str
    inside: float  # between ranks of one node
    between: float  # between nodes
    tokens: int

    @property
    def per_token(self) -> float:
        """All bytes, per token of the chunk."""
        return (self.inside + self.between) / self.tokens


def prefill_gather(
    spec: CacheSpec, gather: Gather, *, tokens: int, start: int, itemsize: int, nodes: int
) -> Traffic:
    """The context-parallel gathers of one chunk: window latents, compressor rows, entries.

    Args:
        spec: the caches (widths of what travels) and the mesh.
        gather: which of the two gathers.
        tokens: length of the chunk.
        start: its first position.
        itemsize: bytes of one value of a latent on the wire (2 in release, 4 in fp32).
        nodes: machines that the ranks fill one after the other.
    """
    parallel = replace(spec.parallel, cp_gather=gather)
    chunks = [Chunk(start, start + tokens)]
    segments = cut(chunks, parallel.cp, 0)
    rows = _row_bytes(spec, chunks, segments, itemsize, everyone=gather == "kv_bf16")
    inside, between = _pairs(parallel, nodes)
    return Traffic(
        name=f"cp gather {gather}", inside=rows * inside, between=rows * between, tokens=tokens
    )


def _row_bytes(
    spec: CacheSpec, chunks: list[Chunk], segments: Segments, itemsize: int, *, everyone: bool
) -> int:
    """Bytes that one rank sends to one other rank of its cp group, all layers."""
    config = spec.config
    window = config.sliding_window
    own, shared = window_wants(chunks, segments, window, [()])
    plan = plan_rows(chunks, segments, rank_wants=own, shared_wants=shared, publish_all=everyone)
    total = len(spec.ratios) * max(plan.counts) * config.head_dim * itemsize
    for ratio in (CSA_RATIO, HCA_RATIO):
        layers = spec.ratios.count(ratio)
        own, shared = group_wants(
            chunks, segments, ratio, ratio == CSA_RATIO, [()], everyone=everyone
        )
        plan = plan_rows(
            chunks, segments, rank_wants=own, shared_wants=shared, publish_all=everyone
        )
        total += layers * max(plan.counts) * 4 * spec.state_width(ratio)  # float32 u and g
        if not everyone:
            entries = max(entry_plan(chunks, segments, ratio).counts)
            width = config.head_dim + (config.index_head_dim if ratio == CSA_RATIO else 0)
            total += layers * entries * width * itemsize
    return total


def routed_row_bytes(config: DeepSeekV4Config, itemsize: int) -> int:
    """Bytes of a row on the way to its experts (``model.parallel.row_bytes.pack_routed``).

    In release (itemsize 2) FP8 codes and a scale for every 128 of them, then weights and ids.
    """
    hidden, choices = config.hidden_size, config.num_experts_per_tok
    values = (hidden, -(-hidden // 128)) if itemsize == 2 else (hidden * itemsize,)
    parts = (*values, choices * max(itemsize, 4), choices * 8)
    return sum(-(-part // 16) * 16 for part in parts)


def expert_traffic(
    config: DeepSeekV4Config,
    parallel: ParallelConfig,
    *,
    tokens: int,
    itemsize: int,
    nodes: int,
) -> Traffic:
    """Expert dispatch and combine of one chunk, for evenly routed tokens.

    A row goes once to each other rank that owns one of its experts (with ``moe_combine: ordered``
    one row per expert comes back); on few ranks to all of them (``model.parallel.expert``).

    Args:
        itemsize: bytes of one activation value (2 in release, 4 in fp32).
    """
    world, chosen = parallel.world, config.num_experts_per_tok
    ordered = parallel.moe_combine == "ordered"
    reached = share_of_rows(world, chosen)
    everyone = not ordered and reached >= GATHER_FROM
    if everyone:
        reached = 1.0
    back = chosen / world if ordered else reached
    layers = config.num_hidden_layers
    sent = reached * routed_row_bytes(config, itemsize)
    row = tokens * layers * (sent + back * config.hidden_size * itemsize)
    per_node = world // nodes
    return Traffic(
        name=f"experts, combine {parallel.moe_combine} ({'all rows' if everyone else 'even routing'})",
        inside=row * (per_node - 1),
        between=row * (world - per_node),
        tokens=tokens,
    )


def _pairs(parallel: ParallelConfig, nodes: int) -> tuple[int, int]:
    """Ordered pairs of ranks that share a cp group: those of one node, those of two."""
    per_node = parallel.world // nodes
    inside = between = 0
    for tp_rank in range(parallel.tp):
        ranks = [c * parallel.tp + tp_rank for c in range(parallel.cp)]
        for a in ranks:
            for b in ranks:
                if a != b and a // per_node == b // per_node:
                    inside += 1
                elif a != b:
                    between += 1
    return inside, between
