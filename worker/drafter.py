"""MTP drafts: keeps the MTP block's window in step with the prompt and proposes tokens after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.deepseek_v4.hyper_connection import Residual
from model.deepseek_v4.model import DeepSeekV4
from model.deepseek_v4.mtp import MTPBlock
from model.forward_batch import RowExchange, WindowPlan
from model.parallel.context import share_rows
from worker.decode_builder import DecodeBuilder, DecodeRows
from worker.kv_cache import KVCachePool
from worker.prefill_builder import PrefillBuilder
from worker.prefill_step import PrefillStep
from worker.protocol import DecodeSlice, PrefillSlice
from worker.sampling import RankSampler
from worker.slots import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """One request to draft for.

    Args:
        position: of the first row in ``streams``.
        tokens: the token after each row; the last one is the request's newest.
        streams: main model streams of the accepted rows [len(tokens), R, D].
    """

    slot_index: int
    slot: Slot
    position: int
    tokens: Sequence[int]
    streams: Tensor


class Drafter:
    """Runs the MTP block of one rank.

    Args:
        num_drafts: tokens to propose per request; 0 only scores.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        pool: KVCachePool,
        decode: DecodeBuilder,
        prefill: PrefillBuilder,
        sampler: RankSampler,
        num_drafts: int,
    ) -> None:
        if model.mtp is None:
            raise ValueError("speculative.mtp needs a checkpoint with an MTP block")
        self.model, self.pool, self.sampler = model, pool, sampler
        self.decode_builder, self.prefill_builder = decode, prefill
        self.mtp: MTPBlock = model.mtp
        self.num_drafts = num_drafts

    def prefill(
        self,
        slices: Sequence[PrefillSlice],
        held: Sequence[Slot],
        step: PrefillStep,
        streams: Tensor,
    ) -> dict[int, bytes]:
        """Keep the window rows of a chunk; returns MTP logits by slice index where asked.

        Args:
            streams: main streams of the local rows [T, R, D].
        """
        fill = step.fill
        if fill is None:
            raise RuntimeError("a step that was built without the MTP block")
        for s, slot in zip(slices, held, strict=True):
            self._resume(s, slot)
        self._save_streams(slices, step, streams)
        scored: dict[int, bytes] = {}
        if any(s.mtp_logits for s in slices):
            scored = self._score_prefill(slices, step, fill.next_ids, streams)
        # After scoring, which still reads the ring's older rows.
        x = self.mtp.inputs(streams[fill.local], self.model.embedding(fill.next_ids[fill.local]))
        self.mtp.block.store_window(x, fill.positions, fill.plan, self.pool.mtp)
        return scored

    def draft(self, requests: Sequence[DraftRequest]) -> None:
        """Write the accepted rows' window latents and refill every slot's drafts."""
        if self.pool.spec.max_drafts:
            self._keep_streams(requests)
        if self.num_drafts == 0:
            return
        rows = [
            DecodeRows(slot=r.slot_index, position=r.position, tokens=r.tokens) for r in requests
        ]
        streams = [r.streams for r in requests]
        proposed: list[list[int]] = [[] for _ in requests]
        for depth in range(self.num_drafts):
            last = self._run(rows, streams)
            logits = self.model.logits(self.mtp.head_rows(last))
            jobs = [
                r.slot.draw_job(row.position + len(row.tokens) + 1, drafts)
                for r, row, drafts in zip(requests, rows, proposed, strict=True)
            ]
            drawn = self.sampler.draw(logits, jobs, with_logprobs=False)
            for drafts, draw in zip(proposed, drawn, strict=True):
                drafts.append(draw.token)
            if depth + 1 == self.num_drafts:
                break
            rows = [
                DecodeRows(
                    slot=row.slot, position=row.position + len(row.tokens), tokens=[drafts[-1]]
                )
                for row, drafts in zip(rows, proposed, strict=True)
            ]
            streams = list(last[:, None])
        for r, drafts in zip(requests, proposed, strict=True):
            r.slot.drafts = drafts

    def score_decode(self, s: DecodeSlice, streams: Tensor) -> bytes:
        """MTP logits of teacher-forced rows whose next token is known, float32 [rows, V]."""
        after = [*s.token_ids[1:], s.next_token]
        known = len(after) if s.next_token >= 0 else len(after) - 1
        if known == 0:
            return b""
        rows = [DecodeRows(slot=s.slot, position=s.position, tokens=after[:known])]
        out = self._forward(rows, [streams[:known]])
        logits = self.model.logits(self.mtp.head_rows(out)).full()
        return logits.cpu().numpy().tobytes()

    def _run(self, rows: Sequence[DecodeRows], streams: Sequence[Tensor]) -> Tensor:
        """The MTP block over all rows; returns the streams of each request's last row [n, R, D]."""
        out = self._forward(rows, streams)
        width = max(len(r.tokens) for r in rows)
        last = [i * width + len(r.tokens) - 1 for i, r in enumerate(rows)]
        return out[torch.tensor(last, device=out.device)]

    def _forward(self, rows: Sequence[DecodeRows], streams: Sequence[Tensor]) -> Tensor:
        batch = self.decode_builder.build(rows, window_only=True)
        width = batch.num_rows // len(rows)
        padded = streams[0].new_zeros(len(rows), width, *streams[0].shape[1:])
        for i, s in enumerate(streams):
            padded[i, : s.shape[0]] = s
        # The batch's ids are the next tokens: what the block embeds beside the streams.
        x = self.mtp.inputs(padded.flatten(0, 1), self.model.embedding(batch.input_ids))
        return self.mtp.block.decode(Residual(x), batch, self.pool.mtp).mixed()

    def _score_prefill(
        self, slices: Sequence[PrefillSlice], step: PrefillStep, next_ids: Tensor, streams: Tensor
    ) -> dict[int, bytes]:
        x = self.mtp.inputs(streams, self.model.embedding(next_ids))
        out = self.mtp.block.prefill(Residual(x), step.batch, self.pool.mtp).mixed()
        result = {}
        for i, s in enumerate(slices):
            end = step.chunks[i].end - (1 if s.next_token < 0 else 0)
            if not s.mtp_logits or end <= s.start:
                continue
            pick = self.prefill_builder.pick(step, [(i, p) for p in range(s.start, end)])
            rows = share_rows(self.model.mesh.cp, self.mtp.head_rows(out[pick.local]), pick)
            logits = self.model.logits(rows).full()
            if self.model.mesh.world.rank == 0:
                result[i] = logits.cpu().numpy().tobytes()
        return result

    def _keep_streams(self, requests: Sequence[DraftRequest]) -> None:
        """Remember the accepted rows' streams, in case a tail is saved after this step."""
        rows = [
            self.pool.stream_row(r.slot_index, r.position + j)
            for r in requests
            for j in range(len(r.tokens))
        ]
        kept = torch.cat([r.streams.flatten(1) for r in requests])
        self.pool.streams[torch.tensor(rows, device=kept.device)] = kept

    def _save_streams(
        self, slices: Sequence[PrefillSlice], step: PrefillStep, streams: Tensor
    ) -> None:
        """A tail keeps the streams of its last token: the MTP row there depends on the next one."""
        saves = [(i, save) for i, s in enumerate(slices) for save in s.save_tails]
        if not saves:
            return
        pick = self.prefill_builder.pick(step, [(i, save.position - 1) for i, save in saves])
        kept = share_rows(self.model.mesh.cp, streams[pick.local].flatten(1), pick)
        tails = torch.tensor([save.tail for _, save in saves], device=kept.device)
        self.pool.tail_streams[tails] = kept

    def _resume(self, s: PrefillSlice, slot: Slot) -> None:
        """After a prefix hit, make the MTP row before the chunk from the tail's streams."""
        if slot.resume_tail < 0:
            return
        tail, slot.resume_tail = slot.resume_tail, -1
        config = self.model.config
        device = self.pool.device
        streams = self.pool.tail_streams[tail].view(1, config.hc_mult, config.hidden_size)
        next_id = torch.tensor([s.token_ids[0]], device=device)
        x = self.mtp.inputs(streams, self.model.embedding(next_id))
        position = np.array([s.start - 1], dtype=np.int64)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        plan = WindowPlan(
            rows=RowExchange(
                send=none,
                counts=(0,) * self.model.mesh.cp.size,
                carried=none,
                state_source=torch.zeros(1, dtype=torch.int64, device=device),
                state_dest=torch.from_numpy(self.pool.window_rows(s.slot, position)).to(device),
                tail_source=none,
                tail_dest=none,
            ),
            workspace=none,
            start=none,
            length=none,
            nowhere=torch.full((1,), -1, device=device),
        )
        self.mtp.block.store_window(x, torch.from_numpy(position).to(device), plan, self.pool.mtp)
