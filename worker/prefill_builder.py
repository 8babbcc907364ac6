"""A prefill StepPlan and this rank's coordinate -> PrefillBatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from model.cache_spec import CacheSpec
from model.deepseek_v4.config import CSA_RATIO
from model.forward_batch import GroupPlan, PickPlan, PrefillBatch, WindowPlan
from model.parallel.config import MeshCoord, ParallelConfig
from model.parallel.partition import (
    RowPlan,
    entry_plan,
    find_token,
    local_index,
    local_tokens,
    mtp_segments,
    num_tokens,
    plan_rows,
    window_wants,
)
from model.parallel.ranges import Chunk, Indices, RowRange, Segment
from worker.batch_layout import joined, on_host, pack
from worker.kept_rows import KeptRows
from worker.kv_cache import KVCachePool
from worker.page_plans import padded_table, page_slots, scratch_plan
from worker.prefill_key import step_key
from worker.prefill_step import MTPFill, PrefillStep
from worker.protocol import PrefillSlice
from worker.row_plans import (
    Chunks,
    Parts,
    cut_chunks,
    group_rows,
    rank_major,
    tails_of,
    window_rows,
)
from worker.slots import SlotTable


class PrefillBuilder:
    """Builds prefill batches for one rank.

    Args:
        pad_tables: pad block tables (``padded_table``), so that the full chunks of a long prompt look
            alike.
    """

    def __init__(
        self,
        spec: CacheSpec,
        parallel: ParallelConfig,
        coord: MeshCoord,
        pool: KVCachePool,
        slots: SlotTable,
        device: torch.device,
        *,
        pad_tables: bool = False,
    ) -> None:
        self.spec, self.parallel, self.coord = spec, parallel, coord
        self.pool, self.slots, self.device = pool, slots, device
        self.pad_tables = pad_tables
        self.window = spec.config.sliding_window
        self.publish_all = parallel.cp_gather == "kv_bf16"

    def build(self, slices: Sequence[PrefillSlice]) -> PrefillStep:
        """Cut the step's chunks and plan everything that moves."""
        chunks = tuple(Chunk(s.start, s.start + len(s.token_ids)) for s in slices)
        segments = cut_chunks(chunks, self.coord.cp, self.parallel.cp_min_tokens)
        request, position = local_tokens(segments[self.coord.cp_rank])
        ids, next_ids = self._local_ids(slices, request, position)
        indices = [s.slot for s in slices]
        block_table, main_table = self.slots.tables(indices)
        if self.pad_tables:
            block_table, main_table = padded_table(block_table), padded_table(main_table)
        scratch = None
        if self.slots.sharded:
            scratch = scratch_plan(chunks, block_table, self.spec.block_size, self.coord)
        ratios = sorted(set(self.spec.ratios) - {0})
        made = PrefillBatch(
            input_ids=on_host(ids),
            positions=on_host(position),
            row_seq=on_host(request),
            counts=tuple(num_tokens(part) for part in segments),
            num_entries={r: on_host((position + 1) // r) for r in ratios},
            window=self._window(slices, chunks, segments),
            groups={
                r: self._group(r, position, slices, chunks, segments, block_table, main_table)
                for r in ratios
            },
            block_table=on_host(block_table),
            main_block_table=on_host(main_table),
            scratch=scratch,
        )
        batch, packed = pack(made, self.device)
        fill = None
        if self.spec.with_mtp:
            fill, _ = pack(self._mtp_fill(slices, chunks, segments, next_ids), self.device)
        return PrefillStep(
            batch=batch,
            packed=packed,
            chunks=chunks,
            segments=segments,
            fill=fill,
            key=step_key(
                chunks,
                segments,
                tails_of(slices),
                block_table.shape[1],
                window=self.window,
                ratios=self.spec.ratios,
            ),
        )

    def pick(self, step: PrefillStep, wanted: Iterable[tuple[int, int]]) -> PickPlan:
        """Plan handing the rows (request, position) to every rank."""
        found = [find_token(step.segments, r, p) for r, p in wanted]
        rows, order = rank_major(found, self.coord.cp)
        plan = PickPlan(
            local=on_host(rows[self.coord.cp_rank]),
            counts=tuple(map(len, rows)),
            order=on_host(order),
        )
        return pack(plan, self.device)[0]

    def _local_ids(
        self, slices: Sequence[PrefillSlice], request: Indices, position: Indices
    ) -> tuple[Indices, Indices]:
        ids = np.zeros_like(position)
        next_ids = np.zeros_like(position)
        for i, s in enumerate(slices):
            own = request == i
            tokens = np.array([*s.token_ids, max(s.next_token, 0)], dtype=np.int64)
            ids[own] = tokens[position[own] - s.start]
            next_ids[own] = tokens[position[own] - s.start + 1]
        return ids, next_ids

    def _window(
        self,
        slices: Sequence[PrefillSlice],
        chunks: Chunks,
        segments: Parts,
    ) -> WindowPlan:
        plan = window_rows(chunks, segments, tails_of(slices), self.window, self.publish_all)
        mine = segments[self.coord.cp_rank]
        return self._window_plan(
            plan, slices, chunks, mine, count=num_tokens(mine), keep=self.window - 1
        )

    def _window_plan(
        self,
        plan: RowPlan,
        slices: Sequence[PrefillSlice],
        chunks: Chunks,
        segments: Sequence[Segment],
        *,
        count: int,
        keep: int,
    ) -> WindowPlan:
        """Index maps of one window stream of ``count`` local rows.

        The ring gets the last ``keep`` rows of each chunk. ``segments`` are those of the rank's queries.
        """
        rank, back = self.coord.cp_rank, self.window - 1
        workspace, start, length, offset = [], [], [], 0
        for own in segments:
            first = max(0, own.start - back)
            workspace.append(plan.index(rank, RowRange(own.request, first, own.end)))
            t = np.arange(own.start, own.end, dtype=np.int64)
            start.append(offset + np.maximum(t - back, 0) - first)
            length.append(np.minimum(t + 1, self.window))
            offset += own.end - first
        kept = KeptRows(plan, rank)
        for i, (s, c) in enumerate(zip(slices, chunks, strict=True)):
            first = max(c.start, c.end - keep)
            ring = self.pool.window_rows(s.slot, np.arange(first, c.end))
            kept.keep(RowRange(i, first, c.end), ring)
            for save in s.save_tails:
                # A window longer than the prefix: the tail's first rows stand for nothing.
                rows = RowRange(i, max(0, save.position - back), save.position)
                tail = self.pool.tail_window_rows(save.tail)
                kept.save(rows, tail[back - (rows.end - rows.start) :])
        return WindowPlan(
            rows=kept.exchange(slices, self.spec.ring_rows),
            workspace=joined(workspace),
            start=joined(start),
            length=joined(length),
            nowhere=on_host(np.full(count, -1)),
        )

    def _group(
        self,
        ratio: int,
        own_positions: Indices,
        slices: Sequence[PrefillSlice],
        chunks: Chunks,
        segments: Parts,
        block_table: Indices,
        main_table: Indices,
    ) -> GroupPlan:
        rank, overlap = self.coord.cp_rank, ratio == CSA_RATIO
        back = int(overlap)
        everyone = self.publish_all or self.coord.cp == 1
        plan = group_rows(chunks, segments, tails_of(slices), ratio, everyone, self.publish_all)
        entries = entry_plan(chunks, segments, ratio, everyone=everyone)
        row_index = [np.zeros((0, ratio * (1 + back)), dtype=np.int64)]
        for index, w0, w1 in entries.ranges[rank]:
            first = max(0, (w0 - back) * ratio)
            rows = plan.index(rank, RowRange(index, first, w1 * ratio)).reshape(-1, ratio)
            if overlap:
                if w0 == 0:
                    rows = np.concatenate([np.full((1, ratio), -1, dtype=np.int64), rows])
                rows = np.concatenate([rows[:-1], rows[1:]], axis=1)
            row_index.append(rows)
        kept = KeptRows(plan, rank)
        for i, (s, c) in enumerate(zip(slices, chunks, strict=True)):
            first = max(c.start, (c.end // ratio - back) * ratio)
            ring = self.pool.state_rows(ratio, s.slot, np.arange(first, c.end))
            kept.keep(RowRange(i, first, c.end), ring)
            for save in s.save_tails if overlap else ():
                rows_before = RowRange(i, save.position - ratio, save.position)
                kept.save(rows_before, self.pool.tail_state_rows(save.tail))
        _, pooled = entries.pooled(rank)
        everything, per_page = entries.gathered(), self.spec.storage_block_size(ratio)
        index_slots = np.zeros(0, dtype=np.int64)
        if ratio == CSA_RATIO:
            index_slots = page_slots(block_table, per_page, *everything)
        return GroupPlan(
            rows=kept.exchange(slices, self.spec.state_rows(ratio)),
            phase=on_host(own_positions % ratio),
            row_index=on_host(np.concatenate(row_index)),
            positions=on_host(pooled * ratio),
            counts=None if everyone else entries.counts,
            main_slots=on_host(page_slots(main_table, per_page, *everything)),
            index_slots=on_host(index_slots),
        )

    def _mtp_fill(
        self,
        slices: Sequence[PrefillSlice],
        chunks: Chunks,
        segments: Parts,
        next_ids: Indices,
    ) -> MTPFill:
        # The first draft runs the chunk's last row through the block, once its next token is known: that
        # row sees window - 1 rows before itself, so the ring keeps one row more than in other layers.
        window = self.window + 1
        kept = mtp_segments(chunks, segments, window, tails_of(slices))
        _, shared = window_wants(chunks, segments, window, tails_of(slices))
        plan = plan_rows(
            chunks,
            kept,
            rank_wants=[()] * self.coord.cp,
            shared_wants=shared,
            publish_all=False,
        )
        rank = self.coord.cp_rank
        ranges = [RowRange(s.request, s.start, s.end) for s in kept[rank]]
        _, position = local_tokens(kept[rank])
        return MTPFill(
            next_ids=on_host(next_ids),
            local=on_host(local_index(segments[rank], ranges)),
            positions=on_host(position),
            plan=self._window_plan(plan, slices, chunks, (), count=len(position), keep=self.window),
        )
