"""Steps through the model: forward, sampling, MTP drafts and their verification.

All ranks run the same code on the same host-side state; rank 0 samples and broadcasts.
Letters: n requests of the step, R streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.deepseek_v4.model import DeepSeekV4
from model.forward_batch import DecodeBatch
from model.parallel.context import share_rows
from model.parallel.mesh import ParallelMesh
from model.parallel.vocab import VocabLogits
from worker.cuda_graph import DecodeGraphs, GraphMemory
from worker.decode_builder import DecodeBuilder, DecodeRows
from worker.drafter import Drafter, DraftRequest
from worker.kv_cache import KVCachePool
from worker.prefill_builder import PrefillBuilder
from worker.prefill_graph import PrefillGraphs
from worker.prefill_step import PrefillStep
from worker.protocol import DecodeSlice, PrefillSlice, SliceOutput, TokenLogprobs
from worker.sampling import Draw, RankSampler
from worker.slots import Slot, SlotTable

_HEAD_ROWS = 512  # rows of full-vocabulary logits held at once


@dataclass(frozen=True, slots=True)
class _Scored:
    """What a slice asked of its prompt rows."""

    prompt_logprobs: list[TokenLogprobs]
    logits: bytes


class ModelRunner:
    """Runs prefill and decode slices against one rank's model and caches."""

    def __init__(
        self,
        model: DeepSeekV4,
        pool: KVCachePool,
        slots: SlotTable,
        prefill: PrefillBuilder,
        decode: DecodeBuilder,
        mesh: ParallelMesh,
        *,
        num_drafts: int,
        graphs: bool,
        prefill_graphs: bool,
    ) -> None:
        self.model, self.pool, self.slots, self.mesh = model, pool, slots, mesh
        self.prefill_builder, self.decode_builder = prefill, decode
        self.num_drafts = num_drafts
        self.graphs = DecodeGraphs(self._forward) if graphs else None
        launch = partial(model.prefill, caches=pool.layers)
        self.prefill_graphs = PrefillGraphs(launch, GraphMemory()) if prefill_graphs else None
        self.sampler = RankSampler(mesh.world, pool.device)
        self.drafter = (
            Drafter(model, pool, decode, prefill, self.sampler, num_drafts) if model.mtp else None
        )

    def prefill(self, slices: Sequence[PrefillSlice]) -> list[SliceOutput]:
        """Run one prefill step; returns outputs on rank 0, none elsewhere."""
        held = [self.slots.get(s.slot, s.request_id) for s in slices]
        for s, slot in zip(slices, held, strict=True):
            self.slots.append_blocks(s.slot, s.block_ids)
            slot.observe(s.token_ids, s.start)
        step = self.prefill_builder.build(slices)
        if self.prefill_graphs is None:
            streams = self.model.prefill(step.batch, self.pool.layers)
        else:
            streams = self.prefill_graphs.run(step)
        mtp_logits: dict[int, bytes] = {}
        if self.drafter is not None:
            mtp_logits = self.drafter.prefill(slices, held, step, streams)
        scored = {
            i: self._score_rows(s, slot, step, streams, i)
            for i, (s, slot) in enumerate(zip(slices, held, strict=True))
            if s.logits or slot.sampling.prompt_logprobs >= 0
        }
        sampling = [i for i, s in enumerate(slices) if s.sample]
        draws = self._sample_prefill(slices, held, step, streams, sampling)
        for s, slot in zip(slices, held, strict=True):
            slot.num_computed = s.start + len(s.token_ids)
        if self.mesh.world.rank != 0:
            return []
        outputs = []
        for i, s in enumerate(slices):
            draw = draws.get(i)
            rows = scored.get(i)
            outputs.append(
                SliceOutput(
                    request_id=s.request_id,
                    token_ids=[draw.token] if draw else [],
                    logprobs=draw.logprobs if draw else [],
                    prompt_logprobs=rows.prompt_logprobs if rows else [],
                    logits=rows.logits if rows else b"",
                    mtp_logits=mtp_logits.get(i, b""),
                )
            )
        return outputs

    def decode(self, slices: Sequence[DecodeSlice]) -> list[SliceOutput]:
        """Run one decode step: verify drafts, sample, draft again."""
        held = [self.slots.get(s.slot, s.request_id) for s in slices]
        rows = []
        for s, slot in zip(slices, held, strict=True):
            self.slots.append_blocks(s.slot, s.block_ids)
            rows.append(DecodeRows(slot=s.slot, position=s.position, tokens=_tokens(s, slot)))
        flat, streams, logits = self._decode_rows(rows)
        speaks, wanted = self._speaks, any(s.logits for s in slices)
        full = logits.full() if wanted else None
        first = {i: k for k, (i, j) in enumerate(flat) if j == 0}
        outputs: list[SliceOutput] = []
        drafts: list[DraftRequest] = []
        draws = self._verify(slices, held, rows, logits, flat)
        for i, (s, slot, r) in enumerate(zip(slices, held, rows, strict=True)):
            own = slice(first[i], first[i] + len(r.tokens))
            mtp_bytes = b""
            if s.token_ids:
                slot.observe(s.token_ids, s.position)
                slot.num_computed = s.position + len(s.token_ids)
                if s.mtp_logits and self.drafter is not None:
                    mtp_bytes = self.drafter.score_decode(s, streams[own])
                accepted: list[Draw] = []
            else:
                accepted = _accept(r.tokens, draws[i])
                slot.advance([d.token for d in accepted], s.position)
                drafts.append(
                    DraftRequest(
                        slot_index=s.slot,
                        slot=slot,
                        position=s.position,
                        tokens=[d.token for d in accepted],
                        streams=streams[own][: len(accepted)],
                    )
                )
            outputs.append(
                SliceOutput(
                    request_id=s.request_id,
                    token_ids=[d.token for d in accepted],
                    num_drafts=len(r.tokens) - 1 if not s.token_ids else 0,
                    num_accepted=max(len(accepted) - 1, 0),
                    logprobs=[lp for d in accepted for lp in d.logprobs],
                    logits=_to_bytes(full[own])
                    if s.logits and speaks and full is not None
                    else b"",
                    mtp_logits=mtp_bytes,
                )
            )
        if self.drafter is not None and drafts:
            self.drafter.draft(drafts)
        return outputs if self._speaks else []

    def close(self) -> None:
        """Give up the captured graphs; nothing may run afterwards."""
        for graphs in (self.graphs, self.prefill_graphs):
            if graphs is not None:
                graphs.close()

    def _decode_rows(
        self, rows: Sequence[DecodeRows]
    ) -> tuple[list[tuple[int, int]], Tensor, VocabLogits]:
        """(slice, token) of every row of the step, and their streams and logits."""
        padded = None
        if self.graphs is not None:
            blocks = max(self.slots.num_blocks[r.slot] for r in rows)
            padded = self.graphs.shape(len(rows), max(blocks, 1))
        batch = self.decode_builder.build(rows, padded=padded)
        run = self._forward if self.graphs is None else self.graphs.run
        streams, local = run(batch)
        width = max(len(r.tokens) for r in rows)
        flat = [(i, j) for i, r in enumerate(rows) for j in range(len(r.tokens))]
        picked: Tensor | slice = slice(0, len(flat))
        if len(flat) < len(rows) * width:  # else padding, if any, comes last
            picked = torch.tensor([i * width + j for i, j in flat], device=streams.device)
        return flat, streams[picked], self.model.sharded(local[picked])

    def _forward(self, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Streams [T, R, D] and this rank's logits [T, share] of all rows, padded ones too."""
        streams = self.model.decode(batch, self.pool.layers)
        return streams, self.model.local_logits(self.model.head_rows(streams))

    @property
    def _speaks(self) -> bool:
        return self.mesh.world.rank == 0

    def _verify(
        self,
        slices: Sequence[DecodeSlice],
        held: Sequence[Slot],
        rows: Sequence[DecodeRows],
        logits: VocabLogits,
        flat: Sequence[tuple[int, int]],
    ) -> dict[int, list[Draw]]:
        """The model's own token after every row of the slices that sample."""
        chosen = [k for k, (i, _) in enumerate(flat) if not slices[i].token_ids]
        if not chosen:
            return {}
        jobs = [
            held[i].draw_job(rows[i].position + j + 1, rows[i].tokens[1 : j + 1])
            for i, j in (flat[k] for k in chosen)
        ]
        drawn = self.sampler.draw(logits if len(chosen) == len(flat) else logits.rows(chosen), jobs)
        result: dict[int, list[Draw]] = {}
        for k, draw in zip(chosen, drawn, strict=True):
            result.setdefault(flat[k][0], []).append(draw)
        return result

    def _sample_prefill(
        self,
        slices: Sequence[PrefillSlice],
        held: Sequence[Slot],
        step: PrefillStep,
        streams: Tensor,
        sampling: Sequence[int],
    ) -> dict[int, Draw]:
        """Draw the first token of every prompt that ends here, and its drafts."""
        if not sampling:
            return {}
        pick = self.prefill_builder.pick(step, [(i, step.chunks[i].end - 1) for i in sampling])
        last = share_rows(self.mesh.cp, streams[pick.local], pick)
        logits = self.model.logits(self.model.head_rows(last))
        jobs = [held[i].draw_job(step.chunks[i].end, []) for i in sampling]
        drawn = self.sampler.draw(logits, jobs)
        requests = []
        for k, (i, draw) in enumerate(zip(sampling, drawn, strict=True)):
            position = step.chunks[i].end - 1
            held[i].advance([draw.token], position)
            requests.append(
                DraftRequest(
                    slot_index=slices[i].slot,
                    slot=held[i],
                    position=position,
                    tokens=[draw.token],
                    streams=last[k : k + 1],
                )
            )
        if self.drafter is not None:
            self.drafter.draft(requests)
        return dict(zip(sampling, drawn, strict=True))

    def _score_rows(
        self, s: PrefillSlice, slot: Slot, step: PrefillStep, streams: Tensor, index: int
    ) -> _Scored:
        """Full-vocabulary logits of every row of one slice, in pieces."""
        chunk = step.chunks[index]
        after = [*s.token_ids[1:], s.next_token]
        found: list[TokenLogprobs] = []
        pieces: list[bytes] = []
        for a in range(chunk.start, chunk.end, _HEAD_ROWS):
            b = min(a + _HEAD_ROWS, chunk.end)
            pick = self.prefill_builder.pick(step, [(index, p) for p in range(a, b)])
            rows = self.model.head_rows(streams[pick.local])
            logits = self.model.logits(share_rows(self.mesh.cp, rows, pick)).full()
            if not self._speaks:
                continue
            if s.logits:
                pieces.append(_to_bytes(logits))
            targets = [t for t in after[a - chunk.start : b - chunk.start] if t >= 0]
            if slot.sampling.prompt_logprobs >= 0 and targets:
                found += self.sampler.logprobs(
                    logits[: len(targets)], targets, slot.sampling.prompt_logprobs
                )
        return _Scored(found, b"".join(pieces))


def _tokens(s: DecodeSlice, slot: Slot) -> list[int]:
    """The slice's rows: given tokens, or the slot's last token and drafts."""
    if s.position != slot.num_computed:
        raise RuntimeError(
            f"request {s.request_id}: the engine decodes at {s.position},"
            f" its slot is at {slot.num_computed}"
        )
    if s.token_ids:
        return s.token_ids
    return [slot.last_token, *slot.drafts[: s.num_tokens - 1]]


def _accept(tokens: Sequence[int], draws: Sequence[Draw]) -> list[Draw]:
    """Draws up to the first one that contradicts its draft, that one included."""
    count = 1
    while count < len(tokens) and tokens[count] == draws[count - 1].token:
        count += 1
    return list(draws[:count])


def _to_bytes(logits: Tensor) -> bytes:
    return logits.to(torch.float32).contiguous().cpu().numpy().tobytes()
