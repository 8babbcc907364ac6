"""Ranks without a model: a deterministic "model" that lives strictly off what the plans say.

The next token is a hash of all tokens of a slot so far. The slot's tokens are kept twice, as the ranks
keep them: position by position in the pages of its blocks, and as the slot's own state, which a tail
copies. Every step compares the two, so a block that is shared by mistake, a tail of another prefix, a
forgotten token or a wrong position fails at once, and what is left shows as a wrong token.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from cluster.errors import WorkerFailure
from worker.protocol import (
    CacheInfo,
    DecodeSlice,
    PrefillSlice,
    SamplingParams,
    SliceOutput,
    SlotInit,
    StepOutput,
    StepPlan,
    TokenLogprobs,
)


def _hash(tokens: list[int], extra: str = "") -> int:
    digest = hashlib.sha256(array("I", tokens).tobytes() + extra.encode()).digest()
    return int.from_bytes(digest[:4], "little")


def next_token(tokens: list[int], sampling: SamplingParams, num_prompt: int, vocab: int) -> int:
    """The mock model: a function of the tokens, and of seed and output position when sampled."""
    extra = ""
    if sampling.temperature > 0:
        extra += f"seed {sampling.seed} at {len(tokens) - num_prompt}"
    if sampling.needs_history:
        extra += f"prompt {num_prompt}"
    return _hash(tokens, extra) % vocab


def reference(
    prompt: list[int],
    sampling: SamplingParams,
    *,
    max_tokens: int,
    vocab: int,
    stop: frozenset[int] = frozenset(),
    min_tokens: int = 0,
) -> list[int]:
    """The output that a request must have, whatever runs beside it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, sampling, len(prompt), vocab))
        if tokens[-1] in stop and len(tokens) - len(prompt) >= min_tokens:
            break
    return tokens[len(prompt) :]


def logit_row(tokens: list[int], vocab: int, kind: str) -> bytes:
    """One float32 row that depends on all ``tokens``."""
    return array("f", [float(_hash(tokens, f"{kind}{i}") % 4096) for i in range(vocab)]).tobytes()


@dataclass
class Slot:
    """A request's state on the mock ranks."""

    init: SlotInit
    table: list[int]
    tokens: list[int]  # the computed ones
    pending: int = -1  # sampled, not computed
    drafts: list[int] = field(default_factory=list)
    last_start: int = 0  # where its last step began
    announced: int = -1  # the token that must come next


class MockExecutor:
    """An ``Executor``; ``fail_on`` holds the numbers of execute calls (from 0) that fail."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 8,
        num_slots: int = 8,
        num_tails: int = 8,
        max_model_len: int = 256,
        vocab: int = 97,
        mtp: int = 0,
        num_shards: int = 1,
        max_batched_tokens: int = 1 << 20,
    ) -> None:
        self.info = CacheInfo(
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            num_tails=num_tails,
            max_model_len=max_model_len,
            allocated_bytes=0,
            weight_bytes=0,
        )
        self.vocab = vocab
        self.mtp = mtp
        self.num_shards = num_shards
        self.max_batched_tokens = max_batched_tokens
        self.ref_count: Callable[[int], int] | None = None
        self.fail_on: set[int] = set()
        self.fail_restarts = 0
        self.calls = 0
        self.starts = 0
        self.alive = False
        self.plans: list[StepPlan] = []
        self._wipe()

    def _wipe(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.tails: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}

    def start(self, report: Callable[[str], None]) -> CacheInfo:
        self.starts += 1
        self.alive = True
        self._wipe()
        report("mock ranks are up")
        return self.info

    def restart(self, report: Callable[[str], None]) -> CacheInfo:
        self.alive = False
        if self.fail_restarts:
            self.fail_restarts -= 1
            raise WorkerFailure(1, "load", -1, "killed while loading")
        return self.start(report)

    def shutdown(self) -> None:
        self.alive = False

    def execute(self, plan: StepPlan) -> StepOutput:
        assert self.alive, "a step on ranks that are down"
        wire = msgspec.msgpack.encode(plan)
        plan = msgspec.msgpack.decode(wire, type=StepPlan)
        self.plans.append(plan)
        self.calls += 1
        if self.calls - 1 in self.fail_on:
            self.alive = False
            raise WorkerFailure(1, plan.phase, plan.step_id, "killed by the test")
        self._check_plan(plan)
        for op in plan.saves:
            slot = self.slots[op.slot]
            assert slot.last_start < op.position <= len(slot.tokens), "boundary left the rings"
            self._save(op.tail, slot, op.position)
        for init in plan.inits:
            self._init(init)
        outputs = [self._prefill(item) for item in plan.prefill]
        outputs += [self._decode(item) for item in plan.decode]
        output = StepOutput(step_id=plan.step_id, rank=0, outputs=outputs)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput)

    def _check_plan(self, plan: StepPlan) -> None:
        slices = [*plan.prefill, *plan.decode]
        assert slices
        assert not (plan.prefill and plan.decode), "a step has one phase"
        assert bool(plan.prefill) == (plan.phase == "prefill")
        used = [item.slot for item in slices]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(self.info.num_slots))
        assert {init.slot for init in plan.inits} <= set(used)
        assert sum(len(item.token_ids) for item in plan.prefill) <= self.max_batched_tokens
        written = [op.tail for item in plan.prefill for op in item.save_tails]
        assert len(set(written)) == len(written), "two prefixes in one tail"
        assert len({op.tail for op in plan.saves}) == len(plan.saves)

    def _save(self, tail: int, slot: Slot, position: int) -> None:
        assert position % self.info.block_size == 0
        assert 0 <= tail < self.info.num_tails
        self.tails[tail] = slot.tokens[:position]

    def _init(self, init: SlotInit) -> None:
        tokens = self.tails[init.restore_tail] if init.restore_tail >= 0 else []
        assert len(tokens) == init.start, "the tail is of another position"
        assert len(init.block_ids) * self.info.block_size == init.start
        assert init.history == (tokens if init.sampling.needs_history else [])
        self.slots[init.slot] = Slot(init=init, table=[], tokens=list(tokens))
        self._extend_table(self.slots[init.slot], init.block_ids)
        self._check_pages(self.slots[init.slot])

    def _extend_table(self, slot: Slot, block_ids: list[int]) -> None:
        for block_id in block_ids:
            assert 0 <= block_id < self.info.num_blocks
            assert block_id % self.num_shards == len(slot.table) % self.num_shards
            assert block_id not in slot.table
            slot.table.append(block_id)

    def _check_pages(self, slot: Slot) -> None:
        size = self.info.block_size
        for position, token in enumerate(slot.tokens):
            page = self.pages.get(slot.table[position // size], [])
            stored = page[position % size] if page else None
            assert stored == token, f"position {position} holds {stored}, must be {token}"

    def _compute(self, slot: Slot, token: int) -> None:
        size = self.info.block_size
        position = len(slot.tokens)
        assert position < self.info.max_model_len
        assert position // size < len(slot.table), f"no block for position {position}"
        block_id = slot.table[position // size]
        if self.ref_count is not None:
            assert self.ref_count(block_id) == 1, "a shared block is written"
        self.pages.setdefault(block_id, [-1] * size)[position % size] = token
        slot.tokens.append(token)

    def _sample(self, slot: Slot, tokens: list[int]) -> int:
        init = slot.init
        return next_token(tokens, init.sampling, init.num_prompt_tokens, self.vocab)

    def _draft(self, slot: Slot, token: int) -> None:
        """Remember the sampled token and propose what may follow: two of three drafts are right."""
        slot.pending = token
        tokens = [*slot.tokens, token]
        slot.drafts = []
        for _ in range(self.mtp):
            right = self._sample(slot, tokens)
            wrong = _hash(tokens, "wrong") % 3 == 0
            tokens.append((right + 1) % self.vocab if wrong else right)
            slot.drafts.append(tokens[-1])

    def _logprob(self, token: int, position: int) -> TokenLogprobs:
        return TokenLogprobs(token_id=token, logprob=-float(position), rank=1)

    def _prefill(self, item: PrefillSlice) -> SliceOutput:
        slot = self.slots[item.slot]
        assert slot.init.request_id == item.request_id
        assert item.start == len(slot.tokens)
        assert item.token_ids
        assert slot.announced in (-1, item.token_ids[0])
        slot.announced = item.next_token
        assert item.sample == (item.next_token < 0) or item.logits
        slot.last_start = item.start
        self._extend_table(slot, item.block_ids)
        rows, mtp_rows = [], []
        following = [*item.token_ids[1:], item.next_token]
        for token, after in zip(item.token_ids, following, strict=True):
            self._compute(slot, token)
            rows.append(logit_row(slot.tokens, self.vocab, "main"))
            if after >= 0:
                mtp_rows.append(logit_row([*slot.tokens, after], self.vocab, "mtp"))
        self._check_pages(slot)
        for save in item.save_tails:
            assert item.start < save.position <= len(slot.tokens)
            self._save(save.tail, slot, save.position)
        token_ids = []
        if item.sample:
            token_ids = [self._sample(slot, slot.tokens)]
            self._draft(slot, token_ids[0])
        sampling = slot.init.sampling
        known = [t for t in following if t >= 0] if sampling.prompt_logprobs >= 0 else []
        where = len(slot.tokens)
        return SliceOutput(
            request_id=item.request_id,
            token_ids=token_ids,
            logprobs=[self._logprob(t, where) for t in token_ids if sampling.logprobs >= 0],
            prompt_logprobs=[self._logprob(t, item.start + 1 + i) for i, t in enumerate(known)],
            logits=b"".join(rows) if item.logits else b"",
            mtp_logits=b"".join(mtp_rows) if item.mtp_logits else b"",
        )

    def _decode(self, item: DecodeSlice) -> SliceOutput:
        slot = self.slots[item.slot]
        assert slot.init.request_id == item.request_id
        assert item.position == len(slot.tokens)
        slot.last_start = item.position
        self._extend_table(slot, item.block_ids)
        if item.token_ids:
            return self._forced(slot, item)
        assert 1 <= item.num_tokens <= 1 + len(slot.drafts)
        rows = [slot.pending, *slot.drafts[: item.num_tokens - 1]]
        out: list[int] = []
        accepted = 0
        for index, row in enumerate(rows):
            self._compute(slot, row)  # drafts are written before they are known to be right
            if accepted == index:
                out.append(self._sample(slot, slot.tokens))
                if index + 1 < len(rows) and rows[index + 1] == out[-1]:
                    accepted += 1
        self._check_pages(slot)
        del slot.tokens[item.position + accepted + 1 :]
        self._draft(slot, out[-1])
        first = item.position + 1
        wanted = slot.init.sampling.logprobs >= 0
        return SliceOutput(
            request_id=item.request_id,
            token_ids=out,
            num_drafts=len(rows) - 1,
            num_accepted=accepted,
            logprobs=[self._logprob(t, first + i) for i, t in enumerate(out)] if wanted else [],
        )

    def _forced(self, slot: Slot, item: DecodeSlice) -> SliceOutput:
        assert item.num_tokens == 1 == len(item.token_ids)
        assert slot.announced in (-1, item.token_ids[0])
        slot.announced = item.next_token
        self._compute(slot, item.token_ids[0])
        self._check_pages(slot)
        tokens = slot.tokens
        mtp = b""
        if item.mtp_logits and item.next_token >= 0:
            mtp = logit_row([*tokens, item.next_token], self.vocab, "mtp")
        return SliceOutput(
            request_id=item.request_id,
            logits=logit_row(tokens, self.vocab, "main") if item.logits else b"",
            mtp_logits=mtp,
        )
