"""Context parallelism of a prefill step: rows and entries that travel between the cp ranks."""

from __future__ import annotations

from torch import Tensor

from kernels import RowStream, pack_rows, unpack_rows
from model.forward_batch import PickPlan, RowExchange, ScratchPlan
from model.parallel.collectives import Group


def row_stream(
    local: Tensor, plan: RowExchange, carried: Tensor, index: Tensor | None
) -> RowStream:
    """One stream of token rows of a prefill step.

    Args:
        local: this rank's rows [T, w]; they become carried's dtype, so that a row is the same whether
            it is read here or carried into the next chunk.
        plan: which rows to publish.
        carried: rows from before the chunk; index: those of them to append, None for all.
    """
    return RowStream(
        local=local, send=plan.send, counts=plan.counts, carried=carried, carried_index=index
    )


def exchange_streams(cp: Group, streams: tuple[RowStream, ...]) -> tuple[Tensor, ...]:
    """Row buffers ``[local | gathered | carried]`` of several streams through one all-gather.

    Nothing is sent when no rank publishes a row.
    """
    return unpack_rows(cp.all_gather(pack_rows(streams)), streams)


def gather_entries(
    cp: Group, entries: tuple[Tensor, ...], counts: tuple[int, ...] | None
) -> tuple[Tensor, ...]:
    """All entries of the step, kind by kind, in canonical order.

    Args:
        entries: this rank's entries of each kind [E, d].
        counts: entries of each rank; None when this rank pooled them all.
    """
    if counts is None or cp.size == 1:
        return entries
    streams = (RowStream(local=e, counts=counts, keep_local=False) for e in entries)
    return exchange_streams(cp, tuple(streams))


def gather_pages(cp: Group, pool: Tensor, plan: ScratchPlan) -> Tensor:
    """Collect the owners' pages, as bytes, into one scratch pool uint8 [sum(counts), page_bytes]."""
    return cp.all_gather_v(pool[plan.pages], plan.counts)


def share_rows(cp: Group, chosen: Tensor, plan: PickPlan) -> Tensor:
    """Hand this rank's chosen rows (``plan.local``) to every rank, in the plan's order."""
    return cp.all_gather_v(chosen, plan.counts)[plan.order]
