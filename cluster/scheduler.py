"""Decides what every step computes: who runs, which chunks, how many drafts.

Rules
- A step has one phase. Prefill goes first while it can (a prompt is not done, or a request waits and a
  slot is free), but after ``MAX_PREFILL_STREAK`` prefill steps in a row the running decodes get a step:
  a decoding request never waits for more than that many steps, and a decode step carries all of them.
- First come, first served. Blocks for all known tokens are taken at admission, so a prompt under way
  never waits for blocks; decode takes more as it grows and, when there are none, preempts the newest
  request, whose prompt and output become a prompt to compute again. Scoring requests hold all their
  blocks from the start and are never preempted. The oldest request always advances.
- Prompts share a step where they fit whole; one that must be split starts as the first of a step.
- Blocks are offered to the prefix cache after the step that filled them succeeded and, in decode, only
  up to the accepted length.

One step is in flight at most: ``schedule`` and ``postprocess`` alternate; ``add`` and ``finish`` come
between. One thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.limits import SchedulerLimits
from cluster.placement import Placement, PlannedTail, PrefixCounters
from cluster.sequence import FinishReason, Sequence, SequenceStatus
from cluster.step_result import SequenceUpdate, check_output
from cluster.step_room import StepRoom
from worker.protocol import (
    DecodeSlice,
    PrefillSlice,
    SliceOutput,
    SlotInit,
    StepOutput,
    StepPlan,
    TailSave,
)

MAX_PREFILL_STREAK = 2


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """What becomes of a slice when its step has succeeded."""

    seq: Sequence
    num_tokens: int
    tails: list[PlannedTail] = field(default_factory=list)


class Scheduler:
    """Sequences in, ``StepPlan``s out."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.sequences: dict[int, Sequence] = {}  # all that have not finished
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first, all older than those waiting
        self.num_preemptions = 0
        self.prefix_counters = PrefixCounters()
        self._next_step_id = 0
        self.reset(limits)

    def reset(self, limits: SchedulerLimits) -> None:
        """Start over on empty ranks, with nothing running. Waiting sequences stay."""
        if self.running:
            raise RuntimeError(f"reset with {len(self.running)} requests running")
        self.limits = limits
        self.placement = Placement(limits, self.prefix_counters)
        self._plan: StepPlan | None = None
        self._in_flight: list[_InFlight] = []
        self._prefill_streak = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.sequences)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; ids must increase. RequestError if it could never run."""
        self.placement.check_fits(seq.request.max_len)
        self.sequences[seq.request_id] = seq
        self.waiting.append(seq)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence: its blocks are free at once and its slot for the next plan.

        On one that has ended already only the reason changes.
        """
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        elif seq.status is not SequenceStatus.FINISHED:
            self.placement.save_crossed(seq)
            self.running.remove(seq)
            self.placement.release(seq)
        self.sequences.pop(seq.request_id, None)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def drop_running(self) -> list[Sequence]:
        """After a failed step: end all that was on the ranks. ``reset`` must follow."""
        self._plan = None
        self._in_flight = []
        dropped = list(self.running)
        for seq in dropped:
            self.finish(seq, FinishReason.ERROR)
        return dropped

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do."""
        if self._plan is not None:
            raise RuntimeError(f"step {self._plan.step_id} is still in flight")
        if not self.has_work:
            return None
        saves = self.placement.take_boundary_saves()
        decodes_wait = any(seq.status is SequenceStatus.DECODE for seq in self.running)
        decode_first = decodes_wait and self._prefill_streak >= MAX_PREFILL_STREAK
        inits: list[SlotInit] = []
        decode = self._plan_decode() if decode_first else []
        prefill = self._plan_prefill(inits) if not decode else []
        if not prefill and not decode_first:
            decode = self._plan_decode()
        if not prefill and not decode:
            raise RuntimeError(
                f"no step can be made: {len(self.running)} running, {len(self.waiting)} waiting, "
                f"{self.placement.blocks.num_free} free KV blocks, "
                f"{self.placement.num_free_slots} free slots"
            )
        self._prefill_streak = self._prefill_streak + 1 if prefill and decodes_wait else 0
        self._plan = StepPlan(
            step_id=self._next_step_id,
            phase="prefill" if prefill else "decode",
            saves=saves,
            inits=inits,
            prefill=prefill,
            decode=decode,
        )
        self._next_step_id += 1
        return self._plan

    def _plan_prefill(self, inits: list[SlotInit]) -> list[PrefillSlice]:
        """Chunks of the prompts under way, then of newly admitted ones (into ``inits``)."""
        room = StepRoom(self.limits)
        slices: list[PrefillSlice] = []
        planned: set[bytes] = set()
        under_way = [seq for seq in self.running if seq.status is SequenceStatus.PREFILL]
        while True:
            if under_way:
                seq = under_way.pop(0)
            elif self.waiting and (admitted := self._admit_next(inits, room)) is not None:
                seq = admitted
            else:
                return slices
            if size := room.chunk(seq):
                slices.append(self._prefill_slice(seq, size, planned))
                room.take(seq, size)

    def _admit_next(self, inits: list[SlotInit], room: StepRoom) -> Sequence | None:
        """Start the first waiting sequence if the step, slots, blocks and a step's logits allow.

        Behind others a step starts only what need not be split. All chunks of a long prompt but the last
        are full ones then, whose shapes come back (``worker.prefill_graph``).
        """
        seq = self.waiting[0]
        if not self.placement.num_free_slots:
            return None
        if not room.is_empty and not room.takes_whole(seq, self.placement.num_cached(seq)):
            return None
        rows = sum(item.logit_rows for item in [*self.running, seq])
        if rows > self.limits.max_logit_rows:
            return None
        # One block each for those who will need it: else admission would only feed preemption.
        headroom = sum(map(self.placement.may_grow, self.running))
        init = self.placement.admit(seq, headroom)
        if init is not None:
            inits.append(init)
            self.waiting.popleft()
            self.running.append(seq)
            seq.status = SequenceStatus.PREFILL
        return None if init is None else seq

    def _prefill_slice(self, seq: Sequence, size: int, planned: set[bytes]) -> PrefillSlice:
        start, end = seq.num_computed, seq.num_computed + size
        tails = self.placement.plan_chunk_tails(seq, end, planned)
        self._in_flight.append(_InFlight(seq=seq, num_tokens=size, tails=tails))
        score = seq.request.score
        return PrefillSlice(
            request_id=seq.request_id,
            slot=seq.slot,
            start=start,
            token_ids=seq.token_ids[start:end],
            next_token=seq.token_ids[end] if end < seq.num_tokens else -1,
            block_ids=self.placement.blocks_to_send(seq, end),
            save_tails=[TailSave(position=item.position, tail=item.tail) for item in tails],
            sample=score is None and end == seq.prefill_target,
            logits=score is not None,
            mtp_logits=score is not None and score.mtp,
        )

    def _plan_decode(self) -> list[DecodeSlice]:
        slices: list[DecodeSlice] = []
        for seq in list(self.running):
            if seq.status is SequenceStatus.DECODE:  # and not preempted by an older one just now
                width = self._decode_width(seq)
                if width:
                    slices.append(self._decode_slice(seq, width))
        return slices

    def _decode_width(self, seq: Sequence) -> int:
        """Rows of the sequence's next decode step, with blocks for them; 0 if it was preempted.

        Drafts are left out where the output ends sooner, and rather than preempt for them.
        """
        if seq.request.score is not None:
            return 1
        left = seq.request.max_len - seq.num_tokens
        width = self.placement.grow(seq, min(1 + self.limits.num_drafts, left))
        while width < 1:
            victim = next(item for item in reversed(self.running) if item.request.score is None)
            self._preempt(victim)
            if victim is seq:
                return 0
            width = self.placement.grow(seq, 1)
        return width

    def _decode_slice(self, seq: Sequence, width: int) -> DecodeSlice:
        position = seq.num_computed
        self._in_flight.append(_InFlight(seq=seq, num_tokens=width))
        score = seq.request.score
        forced = seq.token_ids[position : position + 1] if score is not None else []
        known_next = score is not None and position + 1 < seq.num_tokens
        return DecodeSlice(
            request_id=seq.request_id,
            slot=seq.slot,
            position=position,
            num_tokens=width,
            token_ids=forced,
            next_token=seq.token_ids[position + 1] if known_next else -1,
            block_ids=self.placement.blocks_to_send(seq, position + width),
            logits=score is not None,
            mtp_logits=score is not None and score.mtp,
        )

    def _preempt(self, seq: Sequence) -> None:
        """Take everything from a running sequence; it is the next to be admitted again."""
        self.placement.save_crossed(seq)
        self.running.remove(seq)
        self.placement.release(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def postprocess(self, output: StepOutput) -> list[SequenceUpdate]:
        """Take over a step's result: one update per slice, in the plan's order.

        Raises WorkerFailure, with nothing changed, if the output does not answer the plan.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError(f"output of step {output.step_id}, but no step is in flight")
        check_output(plan, output, self.limits.vocab_size)
        in_flight, self._in_flight, self._plan = self._in_flight, [], None
        results = {item.request_id: item for item in output.outputs}
        return [self._complete(item, results[item.seq.request_id]) for item in in_flight]

    def _complete(self, item: _InFlight, result: SliceOutput) -> SequenceUpdate:
        """Advance one sequence by its slice's result."""
        seq = item.seq
        start = seq.num_computed
        was_prefill = seq.status is SequenceStatus.PREFILL
        is_score = seq.request.score is not None
        rows = item.num_tokens if was_prefill or is_score else result.num_accepted + 1
        prompt_logprobs = seq.take_prompt_logprobs(start, result.prompt_logprobs)
        taken = seq.append_tokens(result.token_ids)
        # Accepted drafts behind a stop token are no part of the sequence.
        seq.num_computed = min(start + rows, seq.num_tokens)
        self.placement.publish(seq)
        self.placement.attach(item.tails)
        if was_prefill:
            self.placement.unpin_restored(seq)
            if result.token_ids or (is_score and seq.num_computed == seq.prefill_target):
                seq.status = SequenceStatus.DECODE
        else:
            self.placement.note_crossing(seq, start)
        if seq.finish_reason is not None:
            self.finish(seq, seq.finish_reason)
        elif is_score and seq.num_computed == seq.num_tokens:
            self.finish(seq, FinishReason.LENGTH)
        return SequenceUpdate(
            seq=seq,
            token_ids=result.token_ids[:taken],
            logprobs=result.logprobs[:taken],
            prompt_logprobs=prompt_logprobs,
            row_start=start,
            num_rows=rows if is_score else 0,
            logits=result.logits,
            mtp_logits=result.mtp_logits,
        )
