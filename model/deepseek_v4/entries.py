"""Compressed entries of a CSA or HCA layer: pooled from token rows, stored in pages, selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import (
    EntryPages,
    RowCopy,
    compress_decode,
    stack_weights,
    store_entries,
    wide_dtype,
)
from model.deepseek_v4.compressor import Compressor
from model.deepseek_v4.config import CSA_RATIO
from model.deepseek_v4.indexer import Indexer
from model.deepseek_v4.projection import Activations, Projector
from model.parallel.context import gather_entries, gather_pages, row_stream

if TYPE_CHECKING:
    from kernels import Numerics, RowStream
    from model.cache_spec import LayerCache
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.forward_batch import DecodeBatch, PrefillBatch
    from model.parallel.config import ParallelConfig
    from model.parallel.mesh import ParallelMesh


@dataclass(frozen=True, slots=True)
class EntryRows:
    """What one product gives for local tokens: compressor rows [T, W], indexer head weights [T, h]."""

    rows: Tensor
    head_weights: Tensor


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
        self.projector, self.eps = Projector(numerics), config.rms_norm_eps
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
        readers = ["compressor.wkv", "compressor.wgate"]
        if ratio == CSA_RATIO:
            self.indexer = Indexer(
                config,
                weights,
                f"{attn}.indexer",
                mesh,
                inv_freq=inv_freq,
                numerics=numerics,
            )
            readers += [f"indexer.{name}" for name in (*readers, "weights_proj")]
        # One product for all that reads the hidden rows unrounded.
        self.wkv_wgate = stack_weights([weights.block(f"{attn}.{r}.weight") for r in readers])
        self.main_width = self.compressor.width
        self.width = self.main_width + (self.indexer.compressor.width if self.indexer else 0)
        parts = [self.compressor.ape_rows]
        if self.indexer is not None:
            parts.append(self.indexer.compressor.ape_rows)
        # What prefill adds to the rows of the product, by position inside the group [ratio, width].
        self.ape = torch.cat(parts, 1).to(wide_dtype(numerics.dtype))

    def index_heads(self, qr: Activations) -> Tensor | None:
        """The indexer's query heads [T, h, di] as the product gives them; None in HCA layers."""
        return None if self.indexer is None else self.indexer.heads_of(qr)

    def rows(self, x: Activations, batch: PrefillBatch) -> EntryRows:
        """The compressors' rows of local tokens, and the indexer's head weights."""
        product = self._product(x)
        rows = product[:, : self.width]
        rows.add_(self.ape[batch.groups[self.ratio].phase])
        return EntryRows(rows, product[:, self.width :])

    def stream(self, rows: EntryRows, batch: PrefillBatch, cache: LayerCache) -> RowStream:
        """How the rows travel between the cp ranks."""
        plan = batch.groups[self.ratio].rows
        return row_stream(rows.rows, plan, cache.state, plan.carried)

    def kept(self, buffer: Tensor, batch: PrefillBatch, cache: LayerCache) -> list[RowCopy]:
        """The copies that store state and tails out of the rows' buffer."""
        plan = batch.groups[self.ratio].rows
        return [
            RowCopy(source=buffer, source_index=source, target=target, target_index=dest)
            for source, target, dest in (
                (plan.state_source, cache.state, plan.state_dest),
                (plan.tail_source, cache.tail_state, plan.tail_dest),
            )
        ]

    def prefill(
        self,
        rows: EntryRows,
        buffer: Tensor,
        qr: Activations,
        batch: PrefillBatch,
        cache: LayerCache,
    ) -> EntryPages:
        """Pool and store the step's entries; returns what the local queries attend to.

        The rows' state is stored elsewhere (``kept``).

        Args:
            buffer: the rows' buffer ``[local | gathered | carried]``.
            qr: normed query latents of local rows.
        """
        plan, cp = batch.groups[self.ratio], self.mesh.cp
        pooled = [self._pool_main(buffer, plan.row_index, plan.positions)]
        if self.indexer is not None:
            pooled.append(self._pool_index(self.indexer, buffer, plan.row_index, plan.positions))
        main, *index = gather_entries(cp, tuple(pooled), plan.counts)
        store_entries(cache.main, cache.main_layout, plan.main_slots, main)
        chosen = None
        num_entries = batch.num_entries[self.ratio]
        if self.indexer is not None:
            store_entries(cache.index, cache.index_layout, plan.index_slots, index[0])
            chosen = self.indexer.select_prefill(
                qr,
                rows.head_weights,
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

    def insert(self, x: Activations, batch: DecodeBatch, cache: LayerCache) -> Tensor:
        """Keep the rows' state and store the entries they complete, in a decode step.

        Returns:
            the indexer's head weights, wide [T, h]; no columns in HCA layers.
        """
        plan = batch.groups[self.ratio]
        product = self._product(x)
        parts = [self.compressor.part(cache.main, cache.main_layout, plan.main_slots)]
        if self.indexer is not None:
            compressor = self.indexer.compressor
            parts.append(compressor.part(cache.index, cache.index_layout, plan.index_slots))
        compress_decode(
            product[:, : self.width],
            cache.state,
            tuple(parts),
            batch.positions,
            batch.row_seq,
            plan.state_base,
            ratio=self.ratio,
            ring_rows=plan.ring_rows,
            inv_freq=self.compressor.inv_freq,
            eps=self.eps,
            quantize=self.projector.quantize,
            dtype=self.projector.dtype,
        )
        return product[:, self.width :]

    def attended(
        self,
        head_weights: Tensor,
        index_q: Tensor | None,
        batch: DecodeBatch,
        cache: LayerCache,
    ) -> EntryPages:
        """What the rows of a decode step attend to, their own entries included.

        Args:
            head_weights: of ``insert``.
            index_q: finished query heads of the indexer [T, h, di]; None in HCA layers.
        """
        chosen = None
        num_entries = batch.num_entries[self.ratio]
        if self.indexer is not None and index_q is not None:
            chosen = self.indexer.select_decode(
                index_q,
                head_weights,
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

    def _product(self, x: Activations) -> Tensor:
        """``[u, g of the compressors | the indexer's head weights]`` [T, n], wide."""
        dtype = wide_dtype(self.projector.dtype)
        return self.projector.product(x, self.wkv_wgate.weight, dtype)

    def _pool_main(self, buffer: Tensor, row_index: Tensor, positions: Tensor) -> Tensor:
        return self.compressor.pool(buffer[:, : self.main_width], row_index, positions)

    def _pool_index(
        self, indexer: Indexer, buffer: Tensor, row_index: Tensor, positions: Tensor
    ) -> Tensor:
        return indexer.compressor.pool(buffer[:, self.main_width :], row_index, positions)
