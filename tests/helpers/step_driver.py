"""Drives one rank's Worker with step plans, without an engine: for whole-model tests on any mesh.

Every rank of a mesh runs the same program on its own ``Driver``. What a driver holds besides the
worker (requests, block tables) is the same on all ranks, because outputs are shared after each step.
All caches start poisoned: whatever is read before it was written turns into NaN in the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.cache_spec import LayerCache
from model.parallel.config import MeshCoord
from model.parallel.mesh import ParallelMesh, build_mesh
from tests.helpers.cache_contents import entries_at, poison_layer
from tests.helpers.model_setup import VOCAB, Setup
from worker.kv_cache import KVCachePool
from worker.protocol import (
    DecodeSlice,
    PrefillSlice,
    SamplingParams,
    SliceOutput,
    SlotInit,
    StepPlan,
    TailOp,
    TailSave,
)
from worker.worker import Worker


@dataclass(slots=True, kw_only=True)
class Request:
    """One running request: ``tokens`` known so far, ``computed`` of them in the caches."""

    id: int
    slot: int
    tokens: list[int]
    computed: int
    blocks: list[int] = field(default_factory=list)
    announced: int = 0  # blocks the ranks know


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A request's share of a prefill step: its next ``count`` tokens."""

    request: Request
    count: int
    tails: tuple[tuple[int, int], ...] = ()  # (position, tail)
    sample: bool = False
    logits: bool = True
    mtp_logits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A request's share of a decode step: ``forced`` known tokens, or its last one and ``drafts``."""

    request: Request
    forced: int = 0
    drafts: int = 0
    logits: bool = False
    mtp_logits: bool = False


class _Rank(Worker):
    """A worker whose process is already in a process group (tests.helpers.ranks)."""

    def join(self) -> None:
        self._mesh = build_mesh(self.config.parallel, self.coord.rank)


class Driver:
    """One rank and the host-side state of its requests."""

    def __init__(self, setup: Setup, rank: int = 0) -> None:
        self.setup, self.rank = setup, rank
        coord = MeshCoord(cp=setup.cp, tp=setup.tp, rank=rank)
        self.worker = _Rank(setup.worker_config(), coord)
        self.worker.join()
        self.worker.load()
        self.info = self.worker.init_cache()
        self.step_id = self.next_id = 0
        self.free: list[list[int]] = []
        self.inits: list[SlotInit] = []
        self.saves: list[TailOp] = []
        self.reset()

    @property
    def pool(self) -> KVCachePool:
        """The rank's caches."""
        assert self.worker._pool is not None
        return self.worker._pool

    @property
    def mesh(self) -> ParallelMesh:
        """The rank's groups."""
        assert self.worker._mesh is not None
        return self.worker._mesh

    def reset(self) -> None:
        """Poison every cache and free every block; ids are handed out in a scrambled order."""
        for layer in self.pool.layers:
            poison_layer(layer)
        self.pool.streams.fill_(float("nan"))
        self.pool.tail_streams.fill_(float("nan"))
        order = np.random.default_rng(5).permutation(self.info.num_blocks).tolist()
        self.free = [[b for b in order if b % self.setup.cp == s] for s in range(self.setup.cp)]

    def open(
        self,
        tokens: list[int],
        slot: int,
        *,
        prompt: int | None = None,
        start: int = 0,
        tail: int = -1,
        blocks: list[int] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Request:
        """Give a slot to a request, with the next step; ``start``, ``tail``, ``blocks``: a prefix hit."""
        self.next_id += 1
        shared = list(blocks or [])
        request = Request(
            id=self.next_id,
            slot=slot,
            tokens=list(tokens),
            computed=start,
            blocks=shared,
            announced=len(shared),
        )
        self.inits.append(
            SlotInit(
                request_id=request.id,
                slot=slot,
                sampling=sampling or SamplingParams(),
                num_prompt_tokens=len(tokens) if prompt is None else prompt,
                start=start,
                restore_tail=tail,
                block_ids=list(shared),
                history=list(tokens[:start]) if sampling and sampling.needs_history else [],
            )
        )
        return request

    def save_tail(self, request: Request, position: int, tail: int) -> None:
        """Save a tail with the next step, before anything else runs."""
        self.saves.append(TailOp(slot=request.slot, position=position, tail=tail))

    def release(self, request: Request) -> None:
        """Give a request's blocks back; the next request gets them first."""
        for i, block in enumerate(request.blocks):
            self.free[i % self.setup.cp].insert(0, block)
        request.blocks = []

    def prefill(self, *parts: Part) -> list[SliceOutput]:
        """One prefill step; every rank returns rank 0's outputs. A sampled token joins the request."""
        slices = []
        for part in parts:
            r = part.request
            end = r.computed + part.count
            slices.append(
                PrefillSlice(
                    request_id=r.id,
                    slot=r.slot,
                    start=r.computed,
                    token_ids=r.tokens[r.computed : end],
                    next_token=r.tokens[end] if end < len(r.tokens) else -1,
                    block_ids=self._grow(r, end),
                    save_tails=[TailSave(position=p, tail=t) for p, t in part.tails],
                    sample=part.sample,
                    logits=part.logits,
                    mtp_logits=part.mtp_logits,
                )
            )
        outputs = self._execute("prefill", prefill=slices)
        for part, output in zip(parts, outputs, strict=True):
            part.request.computed += part.count
            part.request.tokens.extend(output.token_ids)
        return outputs

    def decode(self, *rows: Row) -> list[SliceOutput]:
        """One decode step; forced rows are teacher-forced, others sample and verify drafts."""
        slices = []
        for row in rows:
            r = row.request
            count = row.forced or 1 + row.drafts
            end = r.computed + count
            known = r.tokens[r.computed : end] if row.forced else []
            slices.append(
                DecodeSlice(
                    request_id=r.id,
                    slot=r.slot,
                    position=r.computed,
                    num_tokens=count,
                    token_ids=known,
                    next_token=r.tokens[end] if row.forced and end < len(r.tokens) else -1,
                    block_ids=self._grow(r, end),
                    logits=row.logits,
                    mtp_logits=row.mtp_logits,
                )
            )
        outputs = self._execute("decode", decode=slices)
        for row, output in zip(rows, outputs, strict=True):
            row.request.computed += row.forced or len(output.token_ids)
            row.request.tokens.extend(output.token_ids)
        return outputs

    def generate(self, request: Request, count: int) -> list[int]:
        """Prefill what is left of a request, then decode with drafts: ``count`` new tokens or more."""
        start = len(request.tokens)
        self.prefill(
            Part(request=request, count=start - request.computed, sample=True, logits=False)
        )
        while len(request.tokens) - start < count:
            self.decode(Row(request=request, drafts=self.drafts(request)))
        return request.tokens[start:]

    def drafts(self, request: Request) -> int:
        """Drafts a request's slot holds."""
        assert self.worker._slots is not None
        slot = self.worker._slots.slots[request.slot]
        assert slot is not None
        return len(slot.drafts)

    def contents(self, request: Request) -> list[dict[str, Tensor]]:
        """What later steps may read of a request, per layer, float32.

        ``window`` [n, d] the last 127 rows or fewer; ``state`` the rows of the previous (CSA) and the
        open group; ``main`` [E, d] and ``index`` [E, di] by entry, NaN where another rank has them.
        """
        return [self._layer_contents(layer, request) for layer in self.pool.layers]

    def _layer_contents(self, layer: LayerCache, request: Request) -> dict[str, Tensor]:
        end, pool = request.computed, self.pool
        window = pool.window_rows(request.slot, np.arange(max(0, end - 127), end))
        found = {"window": entries_at(layer.window, layer.window_layout, window)}
        if not layer.ratio:
            return found
        back = int(layer.ratio == 4)
        kept = np.arange(max(0, (end // layer.ratio - back) * layer.ratio), end)
        found["state"] = layer.state[
            torch.from_numpy(pool.state_rows(layer.ratio, request.slot, kept))
        ]
        n = self.setup.block_size // layer.ratio
        entries = np.arange(end // layer.ratio)
        blocks = np.array(request.blocks, dtype=np.int64)[entries // n]
        found["main"] = entries_at(
            layer.main, layer.main_layout, self.owned_page(blocks) * n + entries % n
        )
        found["main"][torch.from_numpy(self.owned_page(blocks) < 0)] = float("nan")
        if layer.ratio == 4:
            found["index"] = entries_at(layer.index, layer.index_layout, blocks * n + entries % n)
        return found

    def owned_page(self, blocks: np.ndarray) -> np.ndarray:
        """This rank's local main page of each block, large negative where it has none."""
        if self.setup.shard == "replicate":
            return blocks
        cp = self.setup.cp
        return np.where(blocks % cp == self.mesh.coord.cp_rank, blocks // cp, -(1 << 30))

    def close(self) -> None:
        """Drop the tensors; the process group stays."""
        self.worker._runner = self.worker._pool = self.worker._model = None

    def _grow(self, request: Request, end: int) -> list[int]:
        """Blocks for positions below ``end``; returns those the ranks do not know yet."""
        while len(request.blocks) * self.setup.block_size < end:
            shard = len(request.blocks) % self.setup.cp
            request.blocks.append(self.free[shard].pop(0))
        fresh = request.blocks[request.announced :]
        request.announced = len(request.blocks)
        return fresh

    def _execute(self, phase: str, **slices: Any) -> list[SliceOutput]:
        inits, saves, self.inits, self.saves = self.inits, self.saves, [], []
        self.step_id += 1
        plan = StepPlan(step_id=self.step_id, phase=phase, saves=saves, inits=inits, **slices)  # type: ignore[arg-type]
        outputs = self.worker.execute(plan).outputs
        if self.setup.cp * self.setup.tp == 1:
            return outputs
        shared = [outputs]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


def rows_of(data: bytes, width: int = VOCAB) -> Tensor:
    """The logits in an answer, float32 [rows, width]."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(-1, width).copy())
