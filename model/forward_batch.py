"""What a forward pass may read besides activations and caches: device tensors, built once per step.

Letters: T rows on this rank, S requests of the step, E compressed entries. Index tensors are int64.
A *row buffer* is ``[local rows | gathered rows | carried rows]`` (see ``model.parallel.partition``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowExchange:
    """How one row stream travels in a prefill step (window latents, or compressor rows).

    Args:
        send: local rows to publish.
        counts: rows each cp rank publishes; all zero when nothing travels.
        carried: rows of the layer's ring to append, ``slot * ring_rows + position % ring_rows``.
        state_source / state_dest: buffer rows to store, and ring rows to store them in.
        tail_source / tail_dest: buffer rows to store, and tail rows to store them in.
    """

    send: Tensor
    counts: tuple[int, ...]
    carried: Tensor
    state_source: Tensor
    state_dest: Tensor
    tail_source: Tensor
    tail_dest: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """The window latents of a prefill step.

    Args:
        rows: the exchange.
        workspace: buffer rows that this rank's queries may see, segment by segment [N].
        start, length: each local query's rows inside the workspace [T].
        nowhere: -1 for each row that the stream starts from.
    """

    rows: RowExchange
    workspace: Tensor
    start: Tensor
    length: Tensor
    nowhere: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """The compressed entries of a prefill step in layers of one ratio.

    Args:
        rows: the exchange of compressor rows (u, g).
        phase: position of each local row inside its group [T].
        row_index: buffer rows each entry pools [E, 8 or 128], -1 = none.
        positions: first token of each entry's group [E].
        counts: entries each cp rank pools when they are gathered; None: every rank pools all.
        main_slots: page slot of every entry of the step in canonical (gathered) order, -1 = not kept
            here.
        index_slots: the same for indexer keys; empty for HCA.
    """

    rows: RowExchange
    phase: Tensor
    row_index: Tensor
    positions: Tensor
    counts: tuple[int, ...] | None
    main_slots: Tensor
    index_slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchPlan:
    """Gathers sharded main pages (``kv_shard: cp``) into one pool for a prefill step.

    Args:
        pages: this rank's local pages that the step reads.
        counts: pages each cp rank sends.
        block_table: int32 [S, B] into the gathered pool.
    """

    pages: Tensor
    counts: tuple[int, ...]
    block_table: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PickPlan:
    """Rows of a prefill step that every rank needs (last tokens, scored rows).

    ``local`` are this rank's rows among them, ``counts`` each cp rank's share, ``order`` maps the
    wanted order to the gathered (rank-major) one.
    """

    local: Tensor
    counts: tuple[int, ...]
    order: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBatch:
    """One prefill step on one rank.

    Args:
        input_ids, positions, row_seq: [T]; row_seq is the request's index in the step.
        counts: rows of every cp rank.
        num_entries: visible compressed entries per row, by ratio [T].
        block_table: int32 [S, B], logical blocks (indexer pages).
        main_block_table: int32 [S, B], local main pages, -1 = on another rank.
    """

    input_ids: Tensor
    positions: Tensor
    row_seq: Tensor
    counts: tuple[int, ...]
    num_entries: dict[int, Tensor]
    window: WindowPlan
    groups: dict[int, GroupPlan]
    block_table: Tensor
    main_block_table: Tensor
    scratch: ScratchPlan | None

    @property
    def num_rows(self) -> int:
        """T."""
        return self.input_ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroups:
    """The entries a decode step completes in layers of one ratio; one line for each row, whether it
    ends a group or not, so that shapes depend on the number of rows alone.

    Args:
        ring_rows: rows of a slot's state ring.
        state_base: first row of the slot's ring [T]; -1 for padded rows.
        main_slots: page slot of the entry that the row completes [T], -1 = none, or not kept here.
        index_slots: the same for indexer keys; empty for HCA.
    """

    ring_rows: int
    state_base: Tensor
    main_slots: Tensor
    index_slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """One decode step, the same on every rank. Padded rows have window_dest, window_slots -1.

    Args:
        input_ids, positions, row_seq: [T].
        window_dest: window ring slot each row is stored in [T].
        window_slots: ring slots each row attends to [T, window].
        num_entries, groups, block_table, main_block_table: as in PrefillBatch.
    """

    input_ids: Tensor
    positions: Tensor
    row_seq: Tensor
    window_dest: Tensor
    window_slots: Tensor
    num_entries: dict[int, Tensor]
    groups: dict[int, DecodeGroups]
    block_table: Tensor
    main_block_table: Tensor

    @property
    def num_rows(self) -> int:
        """T."""
        return self.input_ids.shape[0]
