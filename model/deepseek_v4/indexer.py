"""The lightning indexer of CSA layers: scores compressed keys and selects each query's top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import (
    index_query,
    index_score,
    index_topk,
    prepare_weight,
    topk_merge,
    topk_select,
    widen,
)
from model.deepseek_v4.compressor import Compressor
from model.deepseek_v4.projection import Activations, Projector

if TYPE_CHECKING:
    from kernels import Numerics, PageLayout
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.parallel.collectives import Group
    from model.parallel.mesh import ParallelMesh


class Indexer:
    """Whole on every rank: ranks split query rows (prefill) or entries (dcp), never heads.

    Its head weights [T, h] come from ``weights_proj`` in the layer's stacked product (``entries.py``).
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        weights: WeightDict,
        prefix: str,
        mesh: ParallelMesh,
        *,
        inv_freq: Tensor,
        numerics: Numerics,
    ) -> None:
        self.mesh, self.inv_freq = mesh, inv_freq
        self.projector = Projector(numerics)
        self.topk = config.index_topk
        self.heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.weight_scale = config.index_weight_scale
        self.wq_b = prepare_weight(weights.block(f"{prefix}.wq_b.weight"))
        self.compressor = Compressor(
            config,
            weights,
            f"{prefix}.compressor",
            ratio=4,
            index=True,
            inv_freq=inv_freq,
            quantize=numerics.quantize,
            dtype=numerics.dtype,
        )

    def heads_of(self, qr: Activations) -> Tensor:
        """Query heads [T, h, di] of normed query latents, before RoPE and rounding."""
        q = self.projector.product(qr, self.wq_b)
        return q.view(q.shape[0], self.heads, self.head_dim)

    def select_prefill(
        self,
        qr: Activations,
        head_weights: Tensor,
        positions: Tensor,
        pool: Tensor,
        layout: PageLayout,
        block_table: Tensor,
        row_seq: Tensor,
        num_entries: Tensor,
    ) -> Tensor:
        """Top-k entries of each row, int32 [T, k]; the tp ranks of a cp rank each do a share of rows.

        Args:
            qr: normed query latents [T, q_lora_rank].
            head_weights: of the stacked product, wide [T, h].
            positions, row_seq, num_entries: int64 [T].
            pool, layout, block_table: the layer's index pages.
        """
        tp = self.mesh.tp
        total = positions.shape[0]
        share = -(-total // tp.size)
        bounds = [(min(r * share, total), min((r + 1) * share, total)) for r in range(tp.size)]
        lo, hi = bounds[tp.rank]
        query = index_query(
            self.heads_of(qr.slice(lo, hi)),
            positions[lo:hi],
            self.inv_freq,
            quantize=self.projector.quantize,
        )
        chosen = index_topk(
            query,
            head_weights[lo:hi],
            pool,
            layout,
            block_table,
            row_seq[lo:hi],
            num_entries[lo:hi],
            self.topk,
            head_scale=self.weight_scale,
        )
        return tp.all_gather_v(chosen, [b - a for a, b in bounds])

    def select_decode(
        self,
        query: Tensor,
        head_weights: Tensor,
        pool: Tensor,
        layout: PageLayout,
        block_table: Tensor,
        row_seq: Tensor,
        num_entries: Tensor,
        *,
        dcp: bool,
    ) -> Tensor:
        """Top-k entries of each row, int32 [T, k]; with ``dcp`` each rank scores 1/world of the blocks.

        Args:
            query: finished query heads [T, h, di].
            head_weights, pool, layout, block_table, row_seq, num_entries: as in ``select_prefill``.
        """
        world = self.mesh.world
        if not dcp or world.size == 1:
            return index_topk(
                query,
                head_weights,
                pool,
                layout,
                block_table,
                row_seq,
                num_entries,
                self.topk,
                head_scale=self.weight_scale,
            )
        # Rounded to the streams' dtype as the official product is, then scaled, wide.
        weight = widen(head_weights.to(self.projector.dtype)) * self.weight_scale
        n = layout.entries_per_page
        # Block i of a request is scored by rank i % world, so its entries keep their order.
        full, rest = num_entries // n, num_entries % n
        owned = (full - world.rank + world.size - 1).clamp(min=0) // world.size * n
        owned = owned + torch.where(full % world.size == world.rank, rest, torch.zeros_like(rest))
        table = block_table[:, world.rank :: world.size].contiguous()
        scores = index_score(query, weight, pool, layout, table, row_seq, owned)
        local = topk_select(scores, self.topk).long()
        valid = local >= 0
        if scores.shape[1]:
            values = scores.gather(1, local.clamp(min=0)).masked_fill(~valid, float("-inf"))
        else:
            values = torch.full_like(local, float("-inf"), dtype=scores.dtype)
        entry = (local // n * world.size + world.rank) * n + local % n
        entry = entry.masked_fill(~valid, -1).to(torch.int32)
        all_values = _gather_columns(world, values)
        all_entries = _gather_columns(world, entry)
        return topk_merge(all_values, all_entries, self.topk)


def _gather_columns(group: Group, rows: Tensor) -> Tensor:
    """[T, k] per rank -> [T, size * k], the same on every rank."""
    gathered = group.all_gather(rows.contiguous())
    return gathered.view(group.size, *rows.shape).transpose(0, 1).flatten(1)
