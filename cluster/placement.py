"""Gives sequences their slots, blocks and tails, and takes them back.

The scheduler decides who and when; this class knows how much is left and what the prefix cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.block_manager import BlockManager, PrefixHit
from cluster.limits import SchedulerLimits
from cluster.sequence import Sequence
from worker.protocol import SlotInit, TailOp
from worker.tail_positions import inner_tails


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTail:
    """A tail that the step in flight writes; ``key`` is the hash of the block it ends."""

    position: int
    tail: int
    key: bytes


@dataclass(slots=True, kw_only=True)
class PrefixCounters:
    """Tokens, since the engine's start."""

    queries: int = 0  # looked up in the prefix cache
    hits: int = 0  # found there


class Placement:
    """Slots, blocks and tails of one life of the ranks; a rebuilt gang gets a new one."""

    def __init__(self, limits: SchedulerLimits, counters: PrefixCounters) -> None:
        self.limits = limits
        self.counters = counters
        self.blocks = BlockManager(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            num_tails=limits.num_tails,
            num_shards=limits.num_shards,
        )
        self._free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._boundary_saves: list[tuple[int, int, bytes]] = []  # (slot, position, key)

    @property
    def num_free_slots(self) -> int:
        """Slots no request holds."""
        return len(self._free_slots)

    def check_fits(self, num_tokens: int) -> None:
        """RequestError if a request of ``num_tokens`` (prompt and output) could never run."""
        self.limits.check_fits(num_tokens)

    def admit(self, seq: Sequence, headroom: int) -> SlotInit | None:
        """Give ``seq`` a slot, its cached prefix, and blocks for all its tokens; None if they lack.

        ``headroom`` blocks stay free for those who run already.
        """
        if not self._free_slots:
            return None
        known = seq.num_tokens
        sampling = seq.request.sampling
        hit = self._match(seq)
        block_ids = self.blocks.acquire(seq.chain, hit)
        tail, num_cached = hit.tail, hit.num_blocks
        need = self.limits.num_blocks_for(known) - num_cached
        fits = self.blocks.can_allocate(num_cached, need)
        if not fits or self.blocks.num_free < need + headroom:
            self.blocks.release(block_ids)
            if tail >= 0:
                self.blocks.tails.unpin(tail)
            return None
        start = num_cached * self.limits.block_size
        seq.slot = self._free_slots.pop()
        seq.num_blocks_sent = seq.num_published = num_cached
        seq.block_ids = block_ids + self.blocks.allocate(num_cached, need)
        seq.num_computed = start
        seq.restored_tail = tail
        if self._use_cache(seq):
            self.counters.queries += known
            self.counters.hits += start
        if seq.cached_tokens < 0:
            seq.cached_tokens = start
        return SlotInit(
            request_id=seq.request_id,
            slot=seq.slot,
            sampling=sampling,
            num_prompt_tokens=seq.num_prompt_tokens,
            start=start,
            restore_tail=tail,
            block_ids=block_ids,
            history=seq.token_ids[:start] if sampling.needs_history else [],
        )

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of ``seq`` that it would find in the prefix cache if it were admitted now."""
        return self._match(seq).num_blocks * self.limits.block_size

    def _match(self, seq: Sequence) -> PrefixHit:
        if not self._use_cache(seq):
            return PrefixHit()
        seq.extend_chain(seq.num_tokens, self.limits.block_size)
        return self.blocks.match(seq.chain, seq.num_tokens)

    def _use_cache(self, seq: Sequence) -> bool:
        return self.limits.prefix_cache and not _needs_every_row(seq)

    def may_grow(self, seq: Sequence) -> bool:
        """Whether a running sequence may still take another block (its last token needs none)."""
        return len(seq.block_ids) < self.limits.num_blocks_for(seq.request.max_len - 1)

    def grow(self, seq: Sequence, width: int) -> int:
        """Take blocks so that ``seq`` can compute its next ``width`` tokens; how many it can.

        Fewer than ``width`` when blocks lack: those the held blocks have room for, maybe 0.
        """
        held = len(seq.block_ids)
        need = self.limits.num_blocks_for(seq.num_computed + width) - held
        if need > 0:
            if not self.blocks.can_allocate(held, need):
                return held * self.limits.block_size - seq.num_computed
            seq.block_ids += self.blocks.allocate(held, need)
        return width

    def blocks_to_send(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Block ids up to ``num_tokens`` tokens that the ranks do not know yet; now they do."""
        sent, seq.num_blocks_sent = seq.num_blocks_sent, self.limits.num_blocks_for(num_tokens)
        return seq.block_ids[sent : seq.num_blocks_sent]

    def release(self, seq: Sequence) -> None:
        """Take everything back; published blocks and tails stay cached until their space is needed."""
        self.blocks.release(seq.block_ids)
        self.unpin_restored(seq)
        self._free_slots.append(seq.slot)
        seq.clear_placement()

    def unpin_restored(self, seq: Sequence) -> None:
        """The step that restored the sequence's tail is over."""
        if seq.restored_tail >= 0:
            self.blocks.tails.unpin(seq.restored_tail)
            seq.restored_tail = -1

    def publish(self, seq: Sequence) -> None:
        """Offer the sequence's newly filled blocks, all of accepted tokens, to the prefix cache."""
        full = seq.num_computed // self.limits.block_size
        if self.limits.prefix_cache and not seq.request.score and full > seq.num_published:
            seq.extend_chain(seq.num_computed, self.limits.block_size)
            self.blocks.publish(seq.chain, seq.block_ids, seq.num_published, full)
            seq.num_published = full

    def plan_chunk_tails(self, seq: Sequence, end: int, planned: set[bytes]) -> list[PlannedTail]:
        """Tails to save in the chunk that ends at ``end``, but those that exist or are planned."""
        tails: list[PlannedTail] = []
        if not self.limits.prefix_cache or seq.request.score is not None:
            return tails
        for position in self._tail_positions(seq, end):
            key = seq.boundary_key(position, self.limits.block_size)
            if key not in self.blocks.tails and key not in planned:
                tail = self.blocks.tails.take()
                if tail >= 0:
                    planned.add(key)
                    tails.append(PlannedTail(position=position, tail=tail, key=key))
        return tails

    def _tail_positions(self, seq: Sequence, end: int) -> list[int]:
        """Block boundaries after ``num_computed`` up to ``end`` worth a tail.

        The last one of the tokens known; the last one that a repeat of the same prompt can use (it
        must compute a token); the chunk's end; and every ``tail_interval`` blocks.
        """
        start = seq.num_computed
        size = self.limits.block_size
        ends = {seq.num_tokens // size * size, (seq.num_tokens - 1) // size * size}
        ends |= inner_tails(start, end, block_size=size, interval=self.limits.tail_interval)
        return sorted(position for position in ends if start < position <= end)

    def attach(self, tails: list[PlannedTail]) -> None:
        """The step that wrote ``tails`` succeeded and its blocks are published."""
        for planned in tails:
            self.blocks.attach_tail(planned.tail, planned.key)

    def note_crossing(self, seq: Sequence, before: int) -> None:
        """After a decode step that began at position ``before``: remember the boundary it crossed.

        Every ``tail_interval`` blocks it is saved by the next plan; else only if the request ends now.
        """
        size = self.limits.block_size
        boundary = seq.num_computed // size * size
        seq.crossed = -1
        if self.limits.prefix_cache and boundary > before and seq.request.score is None:
            seq.crossed = boundary
            if boundary % (self.limits.tail_interval * size) == 0:
                self.save_crossed(seq)

    def save_crossed(self, seq: Sequence) -> None:
        """Have the next plan save the boundary that the sequence's last decode step crossed, if any.

        Further back the ranks' rings no longer hold what a tail needs.
        """
        if seq.crossed > 0:
            key = seq.boundary_key(seq.crossed, self.limits.block_size)
            self._boundary_saves.append((seq.slot, seq.crossed, key))
            seq.crossed = -1

    def take_boundary_saves(self) -> list[TailOp]:
        """The crossed boundaries to save in the plan being made.

        A slot's state only changes by its own slices and saves come first in a plan, so the state is
        still there although the request may have ended, and the plan's own inits may read the tail.
        """
        planned: list[PlannedTail] = []
        ops = []
        for slot, position, key in self._boundary_saves:
            if self.blocks.wants_tail(key) and key not in {item.key for item in planned}:
                tail = self.blocks.tails.take()
                if tail >= 0:
                    planned.append(PlannedTail(position=position, tail=tail, key=key))
                    ops.append(TailOp(slot=slot, position=position, tail=tail))
        self.attach(planned)  # after all were taken: else one save could evict another of this plan
        self._boundary_saves = []
        return ops


def _needs_every_row(seq: Sequence) -> bool:
    """Whether no prompt token may be skipped: scoring, or prompt logprobs still to come."""
    if seq.request.score is not None:
        return True
    wanted = seq.request.sampling.prompt_logprobs >= 0
    return wanted and seq.num_prompt_logprobs < seq.num_prompt_tokens - 1
