"""A prefill StepPlan and this rank's coordinate -> PrefillBatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from model.cache_spec import CacheSpec
from model.deepseek_v4.config import CSA_RATIO
from model.forward_batch import (
    GroupPlan,
    PickPlan,
    PrefillBatch,
    RowExchange,
    ScratchPlan,
    WindowPlan,
)
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
from model.parallel.ranges import Chunk, RowRange, Segment
from worker.batch_layout import pack
from worker.kv_cache import KVCachePool
from worker.prefill_key import step_key
from worker.prefill_step import MTPFill, PrefillStep
from worker.protocol import PrefillSlice
from worker.row_plans import Chunks, Parts, cut_chunks, group_rows, tails_of, window_rows
from worker.slots import SlotTable

Indices = np.ndarray

# That the block table of a single request is padded to: 64K tokens in blocks of 256.
LONG_COLUMNS = 256


class PrefillBuilder:
    """Builds prefill batches for one rank.

    Args:
        pad_tables: pad block tables of single requests, so that the full chunks of a long prompt look
            alike. Steps of several requests seldom come back, and keep their tables.
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
        block_table, main_table = map(self._padded, self.slots.tables(indices))
        ratios = sorted(set(self.spec.ratios) - {0})
        on_host = PrefillBatch(
            input_ids=_tensor(ids),
            positions=_tensor(position),
            row_seq=_tensor(request),
            counts=tuple(num_tokens(part) for part in segments),
            num_entries={r: _tensor((position + 1) // r) for r in ratios},
            window=self._window(slices, chunks, segments),
            groups={
                r: self._group(r, position, slices, chunks, segments, block_table, main_table)
                for r in ratios
            },
            block_table=_tensor(block_table),
            main_block_table=_tensor(main_table),
            scratch=self._scratch(chunks, block_table),
        )
        batch, packed = pack(on_host, self.device)
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
        per_rank: list[list[int]] = [[] for _ in range(self.coord.cp)]
        place = []
        for rank, index in found:
            place.append((rank, len(per_rank[rank])))
            per_rank[rank].append(index)
        starts = np.cumsum([0] + [len(p) for p in per_rank])
        order = np.array([starts[rank] + i for rank, i in place], dtype=np.int64)
        local = np.array(per_rank[self.coord.cp_rank], dtype=np.int64)
        plan = PickPlan(
            local=_tensor(local), counts=tuple(len(p) for p in per_rank), order=_tensor(order)
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
        keep_source, keep_dest, tail_source, tail_dest = [], [], [], []
        for i, (s, c) in enumerate(zip(slices, chunks, strict=True)):
            first = max(c.start, c.end - keep)
            keep_source.append(plan.index(rank, RowRange(i, first, c.end)))
            keep_dest.append(self.pool.window_rows(s.slot, np.arange(first, c.end)))
            for save in s.save_tails:
                # A window longer than the prefix: the tail's first rows stand for nothing.
                rows = RowRange(i, max(0, save.position - back), save.position)
                tail_source.append(plan.index(rank, rows))
                kept = self.pool.tail_window_rows(save.tail)
                tail_dest.append(kept[back - (rows.end - rows.start) :])
        request, position = plan.carried_rows()
        carried = _carried(request, position, slices, self.spec.ring_rows)
        return WindowPlan(
            rows=RowExchange(
                send=_tensor(plan.local_rows(rank)),
                counts=plan.counts,
                carried=_tensor(carried),
                state_source=_join(keep_source),
                state_dest=_join(keep_dest),
                tail_source=_join(tail_source),
                tail_dest=_join(tail_dest),
            ),
            workspace=_join(workspace),
            start=_join(start),
            length=_join(length),
            nowhere=_tensor(np.full(count, -1)),
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
        keep_source, keep_dest, tail_source, tail_dest = [], [], [], []
        for i, (s, c) in enumerate(zip(slices, chunks, strict=True)):
            first = max(c.start, (c.end // ratio - back) * ratio)
            keep_source.append(plan.index(rank, RowRange(i, first, c.end)))
            keep_dest.append(self.pool.state_rows(ratio, s.slot, np.arange(first, c.end)))
            for save in s.save_tails if overlap else ():
                rows_before = RowRange(i, save.position - ratio, save.position)
                tail_source.append(plan.index(rank, rows_before))
                tail_dest.append(self.pool.tail_state_rows(save.tail))
        request, position = plan.carried_rows()
        carried = _carried(request, position, slices, self.spec.state_rows(ratio))
        _, pooled = entries.pooled(rank)
        everything = entries.gathered()
        index_slots = np.zeros(0, dtype=np.int64)
        if ratio == CSA_RATIO:
            index_slots = self._page_slots(block_table, ratio, *everything)
        return GroupPlan(
            rows=RowExchange(
                send=_tensor(plan.local_rows(rank)),
                counts=plan.counts,
                carried=_tensor(carried),
                state_source=_join(keep_source),
                state_dest=_join(keep_dest),
                tail_source=_join(tail_source),
                tail_dest=_join(tail_dest),
            ),
            phase=_tensor(own_positions % ratio),
            row_index=_tensor(np.concatenate(row_index)),
            positions=_tensor(pooled * ratio),
            counts=None if everyone else entries.counts,
            main_slots=_tensor(self._page_slots(main_table, ratio, *everything)),
            index_slots=_tensor(index_slots),
        )

    def _padded(self, table: Indices) -> Indices:
        """A single request's block table at a width that its other chunks have; -1 in what is added."""
        if not self.pad_tables or len(table) != 1:
            return table
        columns = max(LONG_COLUMNS, 1 << (table.shape[1] - 1).bit_length())
        return np.pad(table, ((0, 0), (0, columns - table.shape[1])), constant_values=-1)

    def _page_slots(self, table: Indices, ratio: int, request: Indices, entry: Indices) -> Indices:
        """Page slot of each (request, entry); -1 where the block's page is not on this rank."""
        n = self.spec.storage_block_size(ratio)
        page = table[request, entry // n].astype(np.int64)
        return np.where(page >= 0, page * n + entry % n, -1)

    def _scratch(self, chunks: Sequence[Chunk], block_table: Indices) -> ScratchPlan | None:
        if not self.slots.sharded:
            return None
        cp = self.coord.cp
        per_rank: list[list[int]] = [[] for _ in range(cp)]
        places = []
        for i, c in enumerate(chunks):
            for column in range(-(-c.end // self.spec.block_size)):
                block = int(block_table[i, column])
                places.append((i, column, block % cp, len(per_rank[block % cp])))
                per_rank[block % cp].append(block // cp)
        starts = np.cumsum([0] + [len(p) for p in per_rank])
        table = np.full_like(block_table, -1)
        for i, column, owner, index in places:
            table[i, column] = starts[owner] + index
        pages = np.array(per_rank[self.coord.cp_rank], dtype=np.int64)
        return ScratchPlan(
            pages=_tensor(pages),
            counts=tuple(len(p) for p in per_rank),
            block_table=_tensor(table),
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
            next_ids=_tensor(next_ids),
            local=_tensor(local_index(segments[rank], ranges)),
            positions=_tensor(position),
            plan=self._window_plan(plan, slices, chunks, (), count=len(position), keep=self.window),
        )


def _tensor(values: Indices) -> Tensor:
    """Still on the host: all tensors of a step travel together (``pack``)."""
    return torch.from_numpy(np.ascontiguousarray(values))


def _join(parts: list[Indices]) -> Tensor:
    return _tensor(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))


def _carried(
    request: Indices, position: Indices, slices: Sequence[PrefillSlice], ring: int
) -> Indices:
    slot = np.array([s.slot for s in slices], dtype=np.int64)
    rows: Indices = slot[request] * ring + position % ring
    return rows
