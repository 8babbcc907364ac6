"""Context parallelism of a prefill step: rows and entries that travel between the cp ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import RowStream, pack_rows, unpack_rows
from model.forward_batch import PickPlan, RowExchange, ScratchPlan
from model.parallel.collectives import Group


def exchange_rows(cp: Group, local: Tensor, plan: RowExchange, carried: Tensor) -> Tensor:
    """Build the row buffer ``[local | gathered | carried]`` of one stream.

    Args:
        cp: the context-parallel group.
        local: this rank's rows [T, w]; cast to carried's dtype, so that a row is the same whether it
            is read here or carried into the next chunk.
        plan: which rows to publish.
        carried: rows from before the chunk [N, w], N may be zero.

    Returns:
        [T + sum(plan.counts) + N, w]
    """
    local = local.to(carried.dtype)
    parts = [local]
    if any(plan.counts):
        parts.append(cp.all_gather_v(local[plan.send], plan.counts))
    if carried.shape[0]:
        parts.append(carried)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def exchange_streams(cp: Group, streams: tuple[RowStream, ...]) -> tuple[Tensor, ...]:
    """Row buffers ``[local | gathered | carried]`` of several streams through one all-gather.

    Each buffer equals ``exchange_rows`` of its stream. Entries go the same way: ``keep_local=False``
    and no ``send`` gives ``gather_entries``.
    """
    return unpack_rows(cp.all_gather(pack_rows(streams)), streams)


def gather_entries(cp: Group, entries: Tensor, counts: Sequence[int] | None) -> Tensor:
    """All entries of the step in canonical order; ``counts`` None when this rank pooled them all."""
    return entries if counts is None else cp.all_gather_v(entries, counts)


def gather_pages(cp: Group, pool: Tensor, plan: ScratchPlan) -> Tensor:
    """Collect the owners' pages, as bytes, into one scratch pool uint8 [sum(counts), page_bytes]."""
    return cp.all_gather_v(pool[plan.pages], plan.counts)


def share_rows(cp: Group, chosen: Tensor, plan: PickPlan) -> Tensor:
    """Hand this rank's chosen rows (``plan.local``) to every rank, in the plan's order."""
    return cp.all_gather_v(chosen, plan.counts)[plan.order]
