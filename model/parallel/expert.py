"""Expert parallelism: rows travel to the ranks of their experts, results travel back and add up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels import wide_dtype, widen
from model.parallel.mesh import ParallelMesh

RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
SharedExpert = Callable[[Tensor], Tensor]


class ExpertParallel:
    """Routed experts spread over the world: rank r owns ``num_experts / world`` from r times that.

    ``combine: ordered`` returns one row per (token, expert); the token's owner adds them in
    ascending expert id in fp32, the shared expert last: the same bits on every mesh, provided that
    a row's result does not depend on the rows beside it. ``fast`` returns one partial sum per
    (token, rank) in the rows' dtype.

    Attributes:
        first_expert, num_local: the experts this rank owns.
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
        self.num_experts, self.num_local = num_experts, num_experts // mesh.world.size
        self.first_expert = mesh.world.rank * self.num_local

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        run: RunExperts,
        *,
        replicated: bool,
        shared: SharedExpert | None,
    ) -> Tensor:
        """Send rows to their experts, add up what comes back. Every rank of the world calls this.

        Args:
            x: rows [T, D]; T may be zero on some ranks.
            ids: int64 [T, K], ascending in each row, 0 .. num_experts - 1.
            weights: f32 [T, K]; f64 for f64 rows.
            run: (rows [N, D] sorted by local expert, offsets int64 [num_local + 1], row weight f32
                [N]) -> weighted results [N, D]. N may be zero.
            replicated: all ranks of the world hold the same rows. False: rows differ between cp
                ranks and are the same on the tp ranks of one cp rank.
            shared: the shared expert [t, D] -> [t, D], applied to the rows this rank adds up.

        Returns:
            f32 [T, D]; f64 for f64 rows

        Raises:
            ValueError: ids or weights of another shape than [T, K].
        """
        if ids.shape != weights.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
            raise ValueError(
                f"x {tuple(x.shape)}, ids {tuple(ids.shape)}, weights {tuple(weights.shape)},"
                " allowed: [T, D], [T, K], [T, K]"
            )
        if replicated or self.mesh.world.size == 1:
            return _add_shared(self._replicated(x, ids, weights, run), x, shared)
        return self._sharded(x, ids, weights, run, shared)

    def _replicated(self, x: Tensor, ids: Tensor, weights: Tensor, run: RunExperts) -> Tensor:
        """Every rank runs its experts on all rows; no dispatch, the world adds up."""
        world = self.mesh.world
        results, place = self._run_local(x, ids, weights, run)
        if world.size == 1:
            return _sum_slots(results, place)
        if self.ordered:
            # One rank writes each slot, the others add zeros: exact in any dtype.
            slots = world.all_reduce(results[place])
            return _sum_slots(slots.flatten(0, 1), _iota(place))
        return widen(world.all_reduce(_sum_slots(results, place).to(x.dtype)))

    def _sharded(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        run: RunExperts,
        shared: SharedExpert | None,
    ) -> Tensor:
        """The tp ranks split the rows; each row goes once to every rank that owns its experts."""
        tp, world, total = self.mesh.tp, self.mesh.world, x.shape[0]
        edges = [total * r // tp.size for r in range(tp.size + 1)]
        mine = slice(edges[tp.rank], edges[tp.rank + 1])
        x, ids, weights = x[mine], ids[mine], weights[mine]

        dest = ids // self.num_local  # [t, K]
        hit = dest.new_zeros(x.shape[0], world.size, dtype=torch.bool).scatter_(1, dest, True)
        to_rank, token = hit.T.nonzero(as_tuple=True)  # by destination, then token
        asked = torch.stack([hit.sum(0), torch.bincount(dest.flatten(), minlength=world.size)], 1)
        offered = world.all_to_all_v(asked, [1] * world.size, [1] * world.size)
        (send, send_slots), (recv, recv_slots) = asked.T.tolist(), offered.T.tolist()

        rows = world.all_to_all_v(x[token], send, recv)
        # One message: the weights' bits beside ids of the same width.
        weights = widen(weights)
        bits = torch.int64 if weights.dtype is torch.float64 else torch.int32
        routes = torch.cat([ids.to(bits), weights.view(bits)], 1)
        routes = world.all_to_all_v(routes[token], send, recv)
        row_ids, row_weights = routes.chunk(2, 1)
        row_weights = row_weights.contiguous().view(weights.dtype)
        results, place = self._run_local(rows, row_ids.long(), row_weights, run)

        if self.ordered:
            answers = results[place[place < results.shape[0] - 1]]  # by row, then expert
            answers = world.all_to_all_v(answers, recv_slots, send_slots)
            # They come back by destination, then token, then expert.
            order = dest.flatten().argsort(stable=True)
            back = torch.empty_like(order)
            back[order] = _iota(order)
            back = back.view_as(dest)
        else:
            answers = world.all_to_all_v(_sum_slots(results, place).to(x.dtype), recv, send)
            back = dest.new_full((x.shape[0], world.size), answers.shape[0])
            back[token, to_rank] = _iota(token)
        out = _add_shared(_sum_slots(_with_zero_row(answers), back), x, shared)
        counts = [b - a for a, b in pairwise(edges)]
        if self.ordered:
            return tp.all_gather_v(out, counts)
        return widen(tp.all_gather_v(out.to(x.dtype), counts)) if tp.size > 1 else out

    def _run_local(
        self, x: Tensor, ids: Tensor, weights: Tensor, run: RunExperts
    ) -> tuple[Tensor, Tensor]:
        """Run this rank's experts on the rows routed to them.

        Returns:
            results [N + 1, D], the last row zero, and int64 [T, K]: which of them belongs to each
            (row, slot); N where the expert lives elsewhere.
        """
        local = ids - self.first_expert
        flat = torch.where((local >= 0) & (local < self.num_local), local, self.num_local).flatten()
        order = flat.argsort(stable=True)  # by expert, then row
        per_expert = torch.bincount(flat, minlength=self.num_local + 1)[: self.num_local]
        offsets = torch.cat([per_expert.new_zeros(1), per_expert.cumsum(0)])
        count = int(offsets[-1])
        order = order[:count]
        rows = x[order // max(ids.shape[1], 1)]
        results = run(rows, offsets, widen(weights.flatten()[order]))
        place = flat.new_full(flat.shape, count)
        place[order] = _iota(order)
        return _with_zero_row(results), place.view_as(ids)


def _sum_slots(rows: Tensor, place: Tensor) -> Tensor:
    """f32 (f64 for f64 rows) [T, D]: ``rows[place[t, k]]`` added in ascending k, whatever the batch."""
    out = torch.zeros(
        place.shape[0], rows.shape[1], dtype=wide_dtype(rows.dtype), device=rows.device
    )
    for k in range(place.shape[1]):
        out += widen(rows[place[:, k]])
    return out


def _add_shared(out: Tensor, x: Tensor, shared: SharedExpert | None) -> Tensor:
    return out if shared is None else out.add_(widen(shared(x)))


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _iota(like: Tensor) -> Tensor:
    """0, 1, 2, ... in the shape of ``like``, int64."""
    return torch.arange(like.numel(), device=like.device).view_as(like)
