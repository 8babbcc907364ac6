"""Expert parallelism: rows travel to the ranks of their experts, results travel back and add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels import (
    QuantRows,
    beside,
    moe_permute,
    moe_permute_quant,
    moe_unpermute,
    wide_dtype,
    widen,
)
from model.parallel.config import GATHER_FROM, adds_up, share_of_rows
from model.parallel.host_read import to_host
from model.parallel.mesh import ParallelMesh
from model.parallel.row_bytes import pack_routed, slice_rows, unpack_routed

Rows = Tensor | QuantRows
RunExperts = Callable[[Rows, Tensor, Tensor], Tensor]
SharedExpert = Callable[[int, int], Tensor | None]

# Rows of everybody that run through the experts at once: bounds the room for their results.
_GATHERED_ROWS = 16384


class ExpertParallel:
    """Routed experts spread over the world: rank r owns ``num_experts / world`` from r times that.

    ``combine: ordered`` returns one row per (token, expert); the token's owner adds them in
    ascending expert id, wide, the shared expert last: the same bits on every mesh, provided that
    a row's result does not depend on the rows beside it. ``fast`` returns one partial sum per
    (token, rank) in the results' dtype (wide, where ranks add parts of their own). Where a rank
    needs most rows anyway, all ranks get all of them and nothing waits for the host; where few, each
    row travels to the ranks that it needs.

    Attributes:
        first_expert, num_local: the experts this rank owns.
        adds_up: whether replicated rows end in a sum over ranks, to which each may add its parts.
        gather_from: share of all rows that a rank needs, from which on it gets all (``fast``).
    """

    def __init__(
        self, mesh: ParallelMesh, num_experts: int, combine: Literal["fast", "ordered"]
    ) -> None:
        """See the class.

        Raises:
            ValueError: the experts do not divide by the world size.
        """
        if num_experts < 1 or num_experts % mesh.world.size:
            raise ValueError(
                f"{num_experts} experts must divide by the world size {mesh.world.size}"
            )
        if combine not in ("fast", "ordered"):
            raise ValueError(f"combine = {combine!r}, allowed: 'fast', 'ordered'")
        self.mesh, self.ordered = mesh, combine == "ordered"
        self.adds_up = adds_up(mesh.world.size, combine)
        self.num_experts, self.num_local = num_experts, num_experts // mesh.world.size
        self.first_expert = mesh.world.rank * self.num_local
        self.gather_from = GATHER_FROM
        # Never given up: a captured decode step goes on reading the one it saw.
        self._numbers = [torch.arange(0)]

    def reads_counts(self, topk: int) -> bool:
        """Whether a context-parallel prefill step of ``topk`` experts a row waits for the host."""
        return self.ordered or share_of_rows(self.mesh.world.size, topk) < self.gather_from

    def forward(
        self,
        rows: Rows,
        ids: Tensor,
        weights: Tensor,
        run: RunExperts,
        *,
        counts: Sequence[int] | None,
        parts: bool = False,
        shared: SharedExpert | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Send rows to their experts, add up what comes back. Every rank of the world calls this.

        With the same rows on all ranks nothing is read back from the device, so a CUDA graph can hold
        it.

        Args:
            rows: [T, D], as they are or in FP8; T may be zero on some ranks.
            ids: int64 [T, K], ascending in each row, 0 .. num_experts - 1.
            weights: f32 [T, K]; f64 for f64 rows.
            run: (rows [N, D] sorted by local expert, offsets int64 [num_local + 1], row weight f32
                [N]) -> weighted results [N, D]. N may be zero; rows from offsets[-1] on are unused.
            counts: rows of each cp rank, the same on its tp ranks. None: all ranks of the world hold
                the same rows.
            parts: ``shared`` gives this rank's part of a sum over the world (or None), which is added
                before the ranks' sums are. Only without ``counts`` and where ``adds_up``.
            shared: (start, stop) -> the shared expert's result for those rows, of the rows this rank
                adds up.
            dtype: of the result.

        Returns:
            [T, D] in ``dtype``; added up wide and rounded once. With ``parts`` the wide sum itself.

        Raises:
            ValueError: ids or weights of another shape than [T, K], or counts that do not go with
                them; parts where nothing adds them up.
        """
        if ids.shape != weights.shape or ids.dim() != 2 or ids.shape[0] != rows.shape[0]:
            raise ValueError(
                f"rows {tuple(rows.shape)}, ids {tuple(ids.shape)}, weights"
                f" {tuple(weights.shape)}, allowed: [T, D], [T, K], [T, K]"
            )
        if parts:
            if counts is not None or not self.adds_up:
                raise ValueError("parts of the shared expert need a sum over the world's ranks")
            results, place = self._run_local(rows, ids, weights, run, None)
            part = None if shared is None else shared(0, ids.shape[0])
            partial = moe_unpermute(results, place, part, wide_dtype(dtype))
            return self.mesh.world.all_reduce(partial)
        if counts is None or self.mesh.world.size == 1:
            return self._replicated(rows, ids, weights, run, shared, dtype)
        cp = self.mesh.cp
        if len(counts) != cp.size or counts[cp.rank] != ids.shape[0]:
            raise ValueError(
                f"counts {list(counts)}, allowed: {cp.size} of them, {ids.shape[0]} at {cp.rank}"
            )
        if self.reads_counts(ids.shape[1]):
            return self._sharded(rows, ids, weights, run, shared, dtype)
        return self._gathered(rows, ids, weights, run, shared, dtype, counts)

    def _replicated(
        self,
        rows: Rows,
        ids: Tensor,
        weights: Tensor,
        run: RunExperts,
        shared: SharedExpert | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Every rank runs its experts on all rows; no dispatch, the world adds up."""
        world, total = self.mesh.world, ids.shape[0]
        results, place = self._run_local(rows, ids, weights, run, None)
        extra = None if shared is None else shared(0, total)
        if world.size == 1:
            return moe_unpermute(results, place, extra, dtype)
        # ``ordered``: one rank writes each slot, the others add zeros, which is exact in any dtype.
        slots = ids.shape[1] if self.ordered else 1
        columns = place.view(-1, 1) if self.ordered else place
        partial = world.all_reduce(moe_unpermute(results, columns, None, results.dtype))
        numbers = self._iota(partial.shape[0], partial)
        return moe_unpermute(partial, numbers.view(total, slots), extra, dtype)

    def _sharded(
        self,
        rows: Rows,
        ids: Tensor,
        weights: Tensor,
        run: RunExperts,
        shared: SharedExpert | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The tp ranks split the rows; each row goes once to every rank that owns its experts."""
        tp, world, total = self.mesh.tp, self.mesh.world, ids.shape[0]
        edges = [total * r // tp.size for r in range(tp.size + 1)]
        start, stop = edges[tp.rank], edges[tp.rank + 1]
        ids, weights = ids[start:stop], widen(weights[start:stop])

        dest = ids // self.num_local  # [t, K]
        routed = dest[..., None] == self._iota(world.size, ids)  # [t, K, ranks]
        hit = routed.any(1)
        asked = torch.stack([hit.sum(0), routed.sum((0, 1))], 1)
        offered = world.all_to_all_v(asked, [1] * world.size, [1] * world.size)
        read_back = to_host(torch.stack([asked, offered]))
        # Work that needs no counts, so that the device has some while the host waits for them.
        wire = pack_routed(slice_rows(rows, start, stop), ids, weights)
        extra = None if shared is None else shared(start, stop)
        (send, send_slots), (recv, recv_slots) = (
            [*zip(*part, strict=True)] for part in read_back()
        )

        # By destination, then token. The size is known: a sort reads nothing back, nonzero would.
        missing = hit.T.logical_not().flatten().to(torch.int8)
        pairs = missing.argsort(stable=True)[: sum(send)]
        rows_here = max(ids.shape[0], 1)
        to_rank, token = pairs // rows_here, pairs % rows_here
        wire = world.all_to_all_v(wire[token], send, recv)
        received, row_ids, row_weights = unpack_routed(wire, like=rows, weights_like=weights)
        results, place = self._run_local(received, row_ids, row_weights, run, sum(recv_slots))

        if self.ordered:
            answers = results[place[place >= 0]]  # by row, then expert
            answers = world.all_to_all_v(answers, recv_slots, send_slots)
            # They come back by destination, then token, then expert.
            order = dest.flatten().argsort(stable=True)
            back = torch.empty_like(order)
            back[order] = self._iota(order.numel(), order)
            back = back.view_as(dest)
        else:
            partial = moe_unpermute(results, place, None, results.dtype)
            answers = world.all_to_all_v(partial, recv, send)
            back = dest.new_full((ids.shape[0], world.size), -1)
            back[token, to_rank] = self._iota(token.numel(), token)
        out = moe_unpermute(answers, back, extra, dtype)
        return tp.all_gather_v(out, [b - a for a, b in pairwise(edges)])

    def _gathered(
        self,
        rows: Rows,
        ids: Tensor,
        weights: Tensor,
        run: RunExperts,
        shared: SharedExpert | None,
        dtype: torch.dtype,
        counts: Sequence[int],
    ) -> Tensor:
        """The tp ranks split the rows; all rows go to all ranks, partial sums to the rows' owners."""
        tp, world = self.mesh.tp, self.mesh.world
        edges = [[count * r // tp.size for r in range(tp.size + 1)] for count in counts]
        sizes = [b - a for part in edges for a, b in pairwise(part)]  # by world rank
        start, stop = edges[self.mesh.cp.rank][tp.rank : tp.rank + 2]
        pending = None
        if (give := shared) is not None:
            pending = beside(ids.device, lambda: give(start, stop))
        weights = widen(weights[start:stop])
        wire = pack_routed(slice_rows(rows, start, stop), ids[start:stop], weights)
        wire = world.all_gather_v(wire, sizes)
        partial = []
        for first in range(0, max(wire.shape[0], 1), _GATHERED_ROWS):
            piece = wire[first : first + _GATHERED_ROWS]
            some, some_ids, some_weights = unpack_routed(piece, like=rows, weights_like=weights)
            results, place = self._run_local(some, some_ids, some_weights, run, None)
            partial.append(moe_unpermute(results, place, None, results.dtype))
        sums = partial[0] if len(partial) == 1 else torch.cat(partial)
        own = stop - start
        answers = world.all_to_all_v(sums, sizes, [own] * world.size)
        back = self._iota(own * world.size, ids).view(world.size, own).T.contiguous()
        extra = None if pending is None else pending()
        out = moe_unpermute(answers, back, extra, dtype)
        mine = edges[self.mesh.cp.rank]
        return tp.all_gather_v(out, [b - a for a, b in pairwise(mine)])

    def _run_local(
        self, rows: Rows, ids: Tensor, weights: Tensor, run: RunExperts, count: int | None
    ) -> tuple[Tensor, Tensor]:
        """Run this rank's experts on the rows routed to them.

        Args:
            count: rows that go to experts here, where the host knows; None leaves room for all.

        Returns:
            results [N, D], and int64 [T, K]: which of them belongs to each (row, slot), -1 where the
            expert lives elsewhere.
        """
        span = {"first_expert": self.first_expert, "num_local": self.num_local}
        if isinstance(rows, QuantRows):
            fp8 = moe_permute_quant(rows, ids, weights, **span)
            moved: Rows = fp8.rows
            offsets, row_weight, place = fp8.offsets, fp8.row_weight, fp8.place
        else:
            plain = moe_permute(rows, ids, weights, **span)
            moved, offsets = plain.rows, plain.offsets
            row_weight, place = plain.row_weight, plain.place
        if count is not None:
            moved, row_weight = slice_rows(moved, 0, count), row_weight[:count]
        return run(moved, offsets, row_weight), place

    def _iota(self, count: int, like: Tensor) -> Tensor:
        """0, 1, 2, ... int64 [count] on the device of ``like``."""
        newest = self._numbers[-1]
        if newest.numel() < count or newest.device != like.device:
            room = 1 << max(count - 1, 1023).bit_length()
            self._numbers.append(torch.arange(room, device=like.device))
        return self._numbers[-1][:count]
