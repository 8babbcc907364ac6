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
from worker.metadata_buffers import MetadataBuffers
from worker.slots import SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Rows of consecutive tokens of one slot: ``tokens[j]`` at ``position + j``."""

    slot: int
    position: int
    tokens: Sequence[int]


class DecodeBuilder:
    """Builds decode batches; the same on every rank but for the sharded page tables.

    Metadata lies in flat buffers viewed as ``(num_decodes, max_decode_len)``; padded rows have
    ``decode_seq_lens`` 0 and store nothing.
    """

    def __init__(
        self, spec: CacheSpec, pool: KVCachePool, slots: SlotTable, device: torch.device
    ) -> None:
        self.spec, self.pool, self.slots, self.device = spec, pool, slots, device
        self.ratios = sorted(set(spec.ratios) - {0})
        rows = pool.num_slots * (spec.max_drafts + 1)
        window = spec.config.sliding_window
        sizes = {
            "input_ids": (rows, torch.int64),
            "decode_seq_lens": (rows, torch.int64),
            "positions": (rows, torch.int64),
            "row_seq": (rows, torch.int64),
            "window_dest": (rows, torch.int64),
            "window_slots": (rows * window, torch.int64),
            "block_table": (pool.num_slots * slots.block_table.shape[1], torch.int32),
            "main_block_table": (pool.num_slots * slots.block_table.shape[1], torch.int32),
            **{f"state_dest_{r}": (rows, torch.int64) for r in self.ratios},
        }
        self.buffers = MetadataBuffers(sizes, device)

    def build(self, rows: Sequence[DecodeRows], *, window_only: bool = False) -> DecodeBatch:
        """Lay out the rows of all requests; ``window_only`` leaves the compressed layers out (MTP)."""
        width = max(len(r.tokens) for r in rows)
        shape = (len(rows), width)
        count = np.array([len(r.tokens) for r in rows], dtype=np.int64)[:, None]
        first = np.array([r.position for r in rows], dtype=np.int64)[:, None]
        slot = np.array([r.slot for r in rows], dtype=np.int64)[:, None]
        column = np.arange(width, dtype=np.int64)[None]
        valid = column < count
        position = np.where(valid, first + column, 0)
        ids = np.zeros(shape, dtype=np.int64)
        for i, r in enumerate(rows):
            ids[i, : len(r.tokens)] = r.tokens
        seq = np.broadcast_to(np.arange(len(rows), dtype=np.int64)[:, None], shape)
        window, ring = self.spec.config.sliding_window, self.spec.ring_rows
        seen = position[..., None] - np.arange(window - 1, -1, -1, dtype=np.int64)
        slots_seen = slot[..., None] * ring + seen % ring
        seen_valid = (seen >= 0) & valid[..., None]
        fill = self.buffers.fill
        decode_seq_lens = fill("decode_seq_lens", np.where(valid, position + 1, 0)).view(-1)
        table, main_table = self.slots.tables([r.slot for r in rows])
        return DecodeBatch(
            input_ids=fill("input_ids", ids).view(-1),
            positions=fill("positions", position).view(-1),
            row_seq=fill("row_seq", seq).view(-1),
            window_dest=fill(
                "window_dest", np.where(valid, slot * ring + position % ring, -1)
            ).view(-1),
            window_slots=fill("window_slots", np.where(seen_valid, slots_seen, -1)).view(
                -1, window
            ),
            num_entries={
                r: torch.div(decode_seq_lens, r, rounding_mode="floor") for r in self.ratios
            },
            groups={}
            if window_only
            else {
                r: self._groups(r, slot, position, valid, table, main_table) for r in self.ratios
            },
            block_table=fill("block_table", table),
            main_block_table=fill("main_block_table", main_table),
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
        dest = np.where(valid, slot * ring + position % ring, -1)
        seq, column = np.nonzero(valid & ((position + 1) % ratio == 0))
        end = position[seq, column] + 1
        entry = end // ratio - 1
        back = ratio * (2 if ratio == CSA_RATIO else 1)
        pooled = end[:, None] - back + np.arange(back, dtype=np.int64)
        rows = slot[seq] * ring + pooled % ring

        def page_slots(pages: np.ndarray) -> Tensor:
            page = pages[seq, entry // n].astype(np.int64)
            return self._tensor(np.where(page >= 0, page * n + entry % n, -1))

        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        return DecodeGroups(
            state_dest=self.buffers.fill(f"state_dest_{ratio}", dest).view(-1),
            row_index=self._tensor(np.where(pooled >= 0, rows, -1)),
            positions=self._tensor(entry * ratio),
            main_slots=page_slots(main_table),
            index_slots=page_slots(table) if ratio == CSA_RATIO else empty,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
