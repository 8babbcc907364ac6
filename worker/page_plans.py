"""Pages of a prefill step: the width of block tables, page slots, and pages that travel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.forward_batch import ScratchPlan
from model.parallel.config import MeshCoord
from model.parallel.ranges import Chunk, Indices
from worker.batch_layout import on_host
from worker.row_plans import rank_major

# That the block table of a single request is padded to: 64K tokens in blocks of 256.
LONG_COLUMNS = 256


def padded_table(table: Indices) -> Indices:
    """A single request's block table at a width that its other chunks have; -1 in what is added.

    Steps of several requests seldom come back, and keep their tables.
    """
    if len(table) != 1:
        return table
    columns = max(LONG_COLUMNS, 1 << (table.shape[1] - 1).bit_length())
    return np.pad(table, ((0, 0), (0, columns - table.shape[1])), constant_values=-1)


def page_slots(table: Indices, per_page: int, request: Indices, entry: Indices) -> Indices:
    """Page slot of each (request, entry); -1 where the block's page is not on this rank."""
    page = table[request, entry // per_page].astype(np.int64)
    return np.where(page >= 0, page * per_page + entry % per_page, -1)


def scratch_plan(
    chunks: Sequence[Chunk], block_table: Indices, block_size: int, coord: MeshCoord
) -> ScratchPlan:
    """Gather the sharded pages of all blocks that the chunks end in or lie behind."""
    places = [
        (i, column) for i, c in enumerate(chunks) for column in range(-(-c.end // block_size))
    ]
    blocks = [int(block_table[place]) for place in places]
    pages, order = rank_major([(block % coord.cp, block // coord.cp) for block in blocks], coord.cp)
    table = np.full_like(block_table, -1)
    for place, page in zip(places, order, strict=True):
        table[place] = page
    return ScratchPlan(
        pages=on_host(pages[coord.cp_rank]),
        counts=tuple(map(len, pages)),
        block_table=on_host(table),
    )
