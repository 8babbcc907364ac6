"""The lightning indexer of CSA layers: scores compressed keys and selects each query's top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import (
    index_query,
    index_score,
    linear,
    prepare_weight,
    topk_merge,
    topk_select,
    widen,
)
from model.deepseek_v4.compressor import Compressor

if TYPE_CHECKING:
    from kernels import PageLayout
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.parallel.collectives import Group
    from model.parallel.mesh import ParallelMesh

# Scores of one call stay under this many float32 values (256 MB); longer prefills run in row chunks.
_MAX_SCORES = 1 << 26


class Indexer:
    """Whole on every rank: ranks split query rows (prefill) or entries (dcp), never heads."""

    def __init__(
        self,
        config: DeepSeekV4Config,
        weights: WeightDict,
        prefix: str,
        mesh: ParallelMesh,
        *,
        inv_freq: Tensor,
        quantize: bool,
        dtype: torch.dtype,
    ) -> None:
        self.mesh, self.quantize, self.inv_freq = mesh, quantize, inv_freq
        self.topk = config.index_topk
        self.heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.weight_scale = config.index_weight_scale
        self.wq_b = prepare_weight(weights.block(f"{prefix}.wq_b.weight"))
        self.weights_proj = prepare_weight(weights.block(f"{prefix}.weights_proj.weight"))
        self.compressor = Compressor(
            config,
            weights,
            f"{prefix}.compressor",
            ratio=4,
            index=True,
            inv_freq=inv_freq,
            quantize=quantize,
            dtype=dtype,
        )

    def select_prefill(
        self,
        x: Tensor,
        qr: Tensor,
        positions: Tensor,
        pool: Tensor,
        layout: PageLayout,
        block_table: Tensor,
        row_seq: Tensor,
        num_entries: Tensor,
    ) -> Tensor:
        """Top-k entries of each row, int32 [T, k]; the tp ranks of a cp rank each do a share of rows.

        Args:
            x: attn-normed hidden rows [T, D].
            qr: normed query latents [T, q_lora_rank].
            positions, row_seq, num_entries: int64 [T].
            pool, layout, block_table: the layer's index pages.
        """
        tp = self.mesh.tp
        total = x.shape[0]
        share = -(-total // tp.size)
        bounds = [(min(r * share, total), min((r + 1) * share, total)) for r in range(tp.size)]
        lo, hi = bounds[tp.rank]
        args = (x[lo:hi], qr[lo:hi], positions[lo:hi])
        query, weight = self._query(*args)
        columns = block_table.shape[1] * layout.entries_per_page
        step = max(1, _MAX_SCORES // max(columns, 1))
        parts = [torch.empty(0, self.topk, dtype=torch.int32, device=x.device)]
        for a in range(0, hi - lo, step):
            b = min(a + step, hi - lo)
            scores = index_score(
                query[a:b],
                weight[a:b],
                pool,
                layout,
                block_table,
                row_seq[lo + a : lo + b],
                num_entries[lo + a : lo + b],
            )
            parts.append(topk_select(scores, self.topk))
        chosen = torch.cat(parts)
        return tp.all_gather_v(chosen, [b - a for a, b in bounds])

    def select_decode(
        self,
        x: Tensor,
        qr: Tensor,
        positions: Tensor,
        pool: Tensor,
        layout: PageLayout,
        block_table: Tensor,
        row_seq: Tensor,
        num_entries: Tensor,
        *,
        dcp: bool,
    ) -> Tensor:
        """Top-k entries of each row, int32 [T, k]; with ``dcp`` each rank scores 1/world of the blocks."""
        query, weight = self._query(x, qr, positions)
        world = self.mesh.world
        if not dcp or world.size == 1:
            scores = index_score(query, weight, pool, layout, block_table, row_seq, num_entries)
            return topk_select(scores, self.topk)
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

    def _query(self, x: Tensor, qr: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q = linear(qr, self.wq_b, quantize=self.quantize)
        q = q.view(-1, self.heads, self.head_dim)
        q = index_query(q, positions, self.inv_freq, quantize=self.quantize)
        weight = widen(linear(x, self.weights_proj, quantize=False)) * self.weight_scale
        return q, weight


def _gather_columns(group: Group, rows: Tensor) -> Tensor:
    """[T, k] per rank -> [T, size * k], the same on every rank."""
    gathered = group.all_gather(rows.contiguous())
    return gathered.view(group.size, *rows.shape).transpose(0, 1).flatten(1)
