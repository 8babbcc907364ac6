"""Compressed entries of a CSA or HCA layer: pooled from token rows, stored in pages, selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import EntryPages, store_entries
from model.deepseek_v4.compressor import Compressor
from model.deepseek_v4.config import CSA_RATIO
from model.deepseek_v4.indexer import Indexer
from model.parallel.context import exchange_rows, gather_entries, gather_pages

if TYPE_CHECKING:
    from kernels import Numerics
    from model.cache_spec import LayerCache
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.forward_batch import DecodeBatch, PrefillBatch
    from model.parallel.config import ParallelConfig
    from model.parallel.mesh import ParallelMesh


class CompressedEntries:
    """The main compressor of a layer and, in CSA layers, its indexer.

    Compressor rows of both travel and are kept together, main first:
    float32 ``[u, g of the main compressor | u, g of the indexer's]``.
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        parallel: ParallelConfig,
        numerics: Numerics,
        weights: WeightDict,
        attn: str,
        ratio: int,
        inv_freq: Tensor,
        mesh: ParallelMesh,
    ) -> None:
        self.ratio, self.mesh, self.dcp = ratio, mesh, parallel.dcp
        self.main_width = 2 * config.head_dim * (2 if ratio == CSA_RATIO else 1)
        self.compressor = Compressor(
            config,
            weights,
            f"{attn}.compressor",
            ratio=ratio,
            index=False,
            inv_freq=inv_freq,
            quantize=numerics.quantize,
            dtype=numerics.dtype,
        )
        self.indexer: Indexer | None = None
        if ratio == CSA_RATIO:
            self.indexer = Indexer(
                config,
                weights,
                f"{attn}.indexer",
                mesh,
                inv_freq=inv_freq,
                quantize=numerics.quantize,
                dtype=numerics.dtype,
            )

    def prefill(self, x: Tensor, qr: Tensor, batch: PrefillBatch, cache: LayerCache) -> EntryPages:
        """Pool and store the step's entries; returns what the local queries attend to."""
        plan, cp = batch.groups[self.ratio], self.mesh.cp
        local = self._rows(x, batch.positions)
        buffer = exchange_rows(cp, local, plan.rows, cache.state[plan.rows.carried])
        main = self._pool_main(buffer, plan.row_index, plan.positions)
        main = gather_entries(cp, main, plan.counts)
        store_entries(cache.main, cache.main_layout, plan.main_slots, main)
        cache.state[plan.rows.state_dest] = buffer[plan.rows.state_source]
        cache.tail_state[plan.rows.tail_dest] = buffer[plan.rows.tail_source]
        chosen = None
        num_entries = batch.num_entries[self.ratio]
        if self.indexer is not None:
            index = self._pool_index(self.indexer, buffer, plan.row_index, plan.positions)
            index = gather_entries(cp, index, plan.counts)
            store_entries(cache.index, cache.index_layout, plan.index_slots, index)
            chosen = self.indexer.select_prefill(
                x,
                qr,
                batch.positions,
                cache.index,
                cache.index_layout,
                batch.block_table,
                batch.row_seq,
                num_entries,
            )
        pool, table = cache.main, batch.main_block_table
        if batch.scratch is not None:
            pool, table = gather_pages(cp, cache.main, batch.scratch), batch.scratch.block_table
        return EntryPages(
            pool=pool,
            layout=cache.main_layout,
            block_table=table,
            row_seq=batch.row_seq,
            index=chosen,
            num_entries=num_entries,
        )

    def decode(self, x: Tensor, qr: Tensor, batch: DecodeBatch, cache: LayerCache) -> EntryPages:
        """Keep the rows' state, store the entries they complete; returns what they attend to."""
        plan = batch.groups[self.ratio]
        rows = self._rows(x, batch.positions)
        keep = plan.state_dest >= 0
        cache.state[plan.state_dest[keep]] = rows[keep].to(cache.state.dtype)
        main = self._pool_main(cache.state, plan.row_index, plan.positions)
        store_entries(cache.main, cache.main_layout, plan.main_slots, main)
        chosen = None
        num_entries = batch.num_entries[self.ratio]
        if self.indexer is not None:
            index = self._pool_index(self.indexer, cache.state, plan.row_index, plan.positions)
            store_entries(cache.index, cache.index_layout, plan.index_slots, index)
            chosen = self.indexer.select_decode(
                x,
                qr,
                batch.positions,
                cache.index,
                cache.index_layout,
                batch.block_table,
                batch.row_seq,
                num_entries,
                dcp=self.dcp,
            )
        return EntryPages(
            pool=cache.main,
            layout=cache.main_layout,
            block_table=batch.main_block_table,
            row_seq=batch.row_seq,
            index=chosen,
            num_entries=num_entries,
        )

    def _rows(self, x: Tensor, positions: Tensor) -> Tensor:
        rows = self.compressor.rows(x, positions)
        if self.indexer is None:
            return rows
        return torch.cat([rows, self.indexer.compressor.rows(x, positions)], dim=1)

    def _pool_main(self, buffer: Tensor, row_index: Tensor, positions: Tensor) -> Tensor:
        return self.compressor.pool(buffer[:, : self.main_width], row_index, positions)

    def _pool_index(
        self, indexer: Indexer, buffer: Tensor, row_index: Tensor, positions: Tensor
    ) -> Tensor:
        return indexer.compressor.pool(buffer[:, self.main_width :], row_index, positions)
