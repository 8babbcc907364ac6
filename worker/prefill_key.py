"""Which prefill steps have the same shape on every rank, told from the plan alone.

A step may be captured, or replayed, only if all ranks do so at the same step: NCCL wants a collective
captured by all of its ranks or by none, and the shapes of one rank say nothing about another's. So the
decision rests on a key that every rank computes from the same numbers: chunks, the cut over all ranks,
saved tails, and the width of the block table.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from model.parallel.partition import CUT_ALIGN, Segments
from model.parallel.ranges import Chunk

StepKey = Hashable


def step_key(
    chunks: Sequence[Chunk],
    segments: Segments,
    tails: Sequence[Sequence[int]],
    columns: int,
    *,
    window: int,
    ratios: Sequence[int],
) -> StepKey:
    """Equal for steps whose batches have, rank by rank, the same layout.

    Everything of a batch but the contents of its tensors follows from ranges of tokens: chunks, segments,
    tails, the window and the groups of compressed entries behind them, and which of those begin before
    position 0. Moving a chunk by whole periods (the cut's alignment and all groups divide them) moves
    all these ranges with it, as long as nothing reaches back to position 0. So the key is the plan
    itself with each chunk moved back as far as that allows. Of a long prompt, the first chunk and the last
    have keys of their own; the full chunks between share one while the table is as wide (a second chunk
    so near to position 0 that something reaches back to it has its own), and share it with those of
    other prompts that start at the same offset from a chunk's multiple, as prompts without a cached
    prefix do. Who gets a chunk that is not cut depends on where the others lie, so the segments are
    part of it.

    Args:
        chunks, segments: of all requests, over all cp ranks.
        tails: per chunk the positions at which the state is saved.
        columns: of the block table.
        window: sliding window in tokens.
        ratios: compression ratios of the layers; 0 counts for nothing.
    """
    groups = [ratio for ratio in ratios if ratio]
    period = math.lcm(CUT_ALIGN, *groups)
    # From here on a window, and the group before an entry's own, lie behind position 0.
    settled = -(-(window + 2 * max(groups, default=0)) // period) * period
    moved = [max(0, chunk.start // period * period - settled) for chunk in chunks]
    return (
        columns,
        tuple(
            (chunk.start - back, chunk.end - back, *(position - back for position in saved))
            for chunk, back, saved in zip(chunks, moved, tails, strict=True)
        ),
        tuple(
            tuple((s.request, s.start - moved[s.request], s.end - moved[s.request]) for s in part)
            for part in segments
        ),
    )
