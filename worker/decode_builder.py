"""A decode StepPlan -> DecodeBatch, padded to (num_decodes, max_decode_len) rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.cache_spec import CacheSpec
from model.deepseek_v4.config import CSA_RATIO
from model.forward_batch import DecodeBatch, DecodeGroups
from worker.kv_cache import KVCachePool
from worker.metadata_buffers import MetadataBuffers, aligned_bytes
from worker.slots import SlotTable

TABLE_COLUMNS = 16  # that block tables of padded steps have at least


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Rows of consecutive tokens of one slot: ``tokens[j]`` at ``position + j``."""

    slot: int
    position: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class PaddedShape:
    """Sizes that a step is padded to, so that one captured graph serves many steps.

    Args:
        requests: lines of the batch.
        blocks: columns of the block tables.
    """

    requests: int
    blocks: int


class DecodeBuilder:
    """Builds decode batches; the same on every rank but for the sharded page tables.

    Rows are ``(num_decodes, max_decode_len)``, flattened; padded rows have sequence length 0 and store
    nothing. Tensors of one shape lie at the same addresses in every step.
    """

    def __init__(
        self, spec: CacheSpec, pool: KVCachePool, slots: SlotTable, device: torch.device
    ) -> None:
        self.spec, self.pool, self.slots, self.device = spec, pool, slots, device
        self.ratios = sorted(set(spec.ratios) - {0})
        self._no_slots = torch.zeros(0, dtype=torch.int64, device=device)
        lines = 2 * pool.num_slots  # a padded batch may have more lines than there are slots
        rows = lines * (spec.max_drafts + 1)
        per_row = 4 + spec.config.sliding_window + 4 * len(self.ratios)
        room = per_row * aligned_bytes(8 * rows)
        columns = max(slots.block_table.shape[1], TABLE_COLUMNS)
        room += 2 * aligned_bytes(8 * lines * columns)  # int32, padded to at most twice the columns
        self.buffers = MetadataBuffers(room, device)

    def build(
        self,
        rows: Sequence[DecodeRows],
        *,
        window_only: bool = False,
        padded: PaddedShape | None = None,
    ) -> DecodeBatch:
        """Lay out the rows of all requests; ``window_only`` leaves the compressed layers out (MTP)."""
        width = max(len(r.tokens) for r in rows)
        lines = len(rows) if padded is None else padded.requests
        shape = (lines, width)

        def column(values: Sequence[int]) -> np.ndarray:
            """One number a line; zero in padded lines."""
            return np.array([*values, *[0] * (lines - len(rows))], dtype=np.int64)[:, None]

        count = column([len(r.tokens) for r in rows])
        slot = column([r.slot for r in rows])
        index = np.arange(width, dtype=np.int64)[None]
        valid = index < count
        position = np.where(valid, column([r.position for r in rows]) + index, 0)
        ids = np.zeros(shape, dtype=np.int64)
        for i, r in enumerate(rows):
            ids[i, : len(r.tokens)] = r.tokens
        seq = np.broadcast_to(np.arange(lines, dtype=np.int64)[:, None], shape)
        window, ring = self.spec.config.sliding_window, self.spec.ring_rows
        seen = position[..., None] - np.arange(window - 1, -1, -1, dtype=np.int64)
        slots_seen = slot[..., None] * ring + seen % ring
        seen_valid = (seen >= 0) & valid[..., None]
        seq_lens = np.where(valid, position + 1, 0)
        table, main_table = self._tables(rows, padded)
        put = self.buffers.put
        self.buffers.begin()
        batch = DecodeBatch(
            input_ids=put(ids).view(-1),
            positions=put(position).view(-1),
            row_seq=put(seq).view(-1),
            window_dest=put(np.where(valid, slot * ring + position % ring, -1)).view(-1),
            window_slots=put(np.where(seen_valid, slots_seen, -1)).view(-1, window),
            num_entries={r: put(seq_lens // r).view(-1) for r in self.ratios},
            groups={}
            if window_only
            else {
                r: self._groups(r, slot, position, valid, table, main_table) for r in self.ratios
            },
            block_table=put(table),
            main_block_table=put(main_table),
        )
        self.buffers.commit()
        return batch

    def _tables(
        self, rows: Sequence[DecodeRows], padded: PaddedShape | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logical blocks and local main pages, int32 [lines, blocks], -1 = none."""
        table, main_table = self.slots.tables([r.slot for r in rows])
        if padded is None:
            return table, main_table
        lines, blocks = padded.requests - table.shape[0], padded.blocks - table.shape[1]
        edges = ((0, lines), (0, blocks))
        return (
            np.pad(table, edges, constant_values=-1),
            np.pad(main_table, edges, constant_values=-1),
        )

    def _groups(
        self,
        ratio: int,
        slot: np.ndarray,
        position: np.ndarray,
        valid: np.ndarray,
        table: np.ndarray,
        main_table: np.ndarray,
    ) -> DecodeGroups:
        ring, n = self.spec.state_rows(ratio), self.spec.storage_block_size(ratio)
        entry = (position + 1) // ratio - 1
        ends = valid & ((position + 1) % ratio == 0)
        put = self.buffers.put

        def page_slots(pages: np.ndarray) -> Tensor:
            block = np.clip(entry // n, 0, pages.shape[1] - 1)
            page = np.take_along_axis(pages, block, axis=1).astype(np.int64)
            return put(np.where(ends & (page >= 0), page * n + entry % n, -1)).view(-1)

        return DecodeGroups(
            ring_rows=ring,
            state_base=put(np.where(valid, slot * ring, -1)).view(-1),
            main_slots=page_slots(main_table),
            index_slots=page_slots(table) if ratio == CSA_RATIO else self._no_slots,
        )
