"""What a plan holds: chunks, drafts, tails, fairness, preemption, scoring; driven by mock ranks."""

from __future__ import annotations

import msgspec
import pytest

from cluster.errors import RequestError, WorkerFailure
from cluster.limits import SchedulerLimits
from cluster.scheduler import MAX_PREFILL_STREAK, Scheduler
from cluster.sequence import FinishReason, Request, ScoreSpec, Sequence, SequenceStatus
from tests.helpers.mock_executor import MockExecutor, reference
from worker.protocol import (
    SamplingParams,
    SliceOutput,
    StepOutput,
    StepPlan,
    TailOp,
    TailSave,
)

VOCAB = 97


class Bench:
    """A scheduler on mock ranks."""

    def __init__(self, **options: int | bool) -> None:
        self.ranks = MockExecutor(
            vocab=VOCAB,
            **{  # type: ignore[arg-type]
                key: options.pop(key)
                for key in (
                    "num_blocks",
                    "num_slots",
                    "num_tails",
                    "max_model_len",
                    "mtp",
                    "num_shards",
                )
                if key in options
            },
        )
        info = self.ranks.start(lambda line: None)
        self.limits = SchedulerLimits(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            num_shards=self.ranks.num_shards,
            num_tails=info.num_tails,
            num_slots=info.num_slots,
            max_model_len=info.max_model_len,
            num_drafts=self.ranks.mtp,
            vocab_size=int(options.pop("vocab_size", VOCAB)),
            **{"max_batched_tokens": 64, "tail_interval": 2, "prefix_cache": True, **options},  # type: ignore[arg-type]
        )
        self.scheduler = Scheduler(self.limits)
        self.ranks.ref_count = self.scheduler.placement.blocks.ref_count
        self.next_id = 0

    def add(self, prompt: list[int], max_tokens: int = 4, **options: object) -> Sequence:
        request = Request(
            request_id=self.next_id,
            prompt_ids=tuple(prompt),
            max_tokens=max_tokens,
            **options,  # type: ignore[arg-type]
        )
        seq = Sequence(request)
        self.scheduler.add(seq)
        self.next_id += 1
        return seq

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.scheduler.postprocess(self.ranks.execute(plan))
        return plan

    def run(self) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) < 2000
        return plans

    def expected(self, seq: Sequence) -> list[int]:
        request = seq.request
        return reference(
            list(request.prompt_ids),
            request.sampling,
            max_tokens=request.max_tokens,
            vocab=VOCAB,
            stop=request.stop_token_ids,
        )

    def is_clean(self) -> bool:
        placement = self.scheduler.placement
        return (
            placement.blocks.num_free == self.limits.num_blocks
            and placement.num_free_slots == self.limits.num_slots
            and placement.blocks.tails.num_pinned == 0
            and placement.blocks.tails.num_taken == 0
        )


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first * 31 + 7 * i) % VOCAB for i in range(length)]


def chunks_of(plans: list[StepPlan]) -> list[list[tuple[int, int, int]]]:
    """(request, start, tokens) of every slice, by step."""
    return [[(s.request_id, s.start, len(s.token_ids)) for s in plan.prefill] for plan in plans]


def test_long_prompts_are_chunked_and_share_their_last_step() -> None:
    bench = Bench(max_batched_tokens=20)
    bench.add(prompt(33), 1)
    bench.add(prompt(5, 1), 1)
    bench.add(prompt(2, 2), 1)
    plans = bench.run()
    assert chunks_of(plans) == [[(0, 0, 20)], [(0, 20, 13), (1, 0, 5), (2, 0, 2)]]
    assert [[s.sample for s in plan.prefill] for plan in plans] == [[False], [True] * 3]
    assert plans[0].prefill[0].next_token == prompt(33)[20]
    assert plans[1].prefill[0].next_token == -1
    # Blocks are announced with the chunk that needs them first.
    assert [len(s.block_ids) for plan in plans for s in plan.prefill] == [3, 2, 1, 1]
    assert bench.is_clean()


def test_a_prompt_that_must_be_split_starts_a_step() -> None:
    """Queued long prompts have chunks at multiples of a step's tokens, short ones before or behind."""
    bench = Bench(max_batched_tokens=20, num_slots=8)
    lengths = (5, 33, 47, 8, 13, 41, 20)
    seqs = [bench.add(prompt(length, i), 1) for i, length in enumerate(lengths)]
    assert chunks_of(bench.run()) == [
        [(0, 0, 5)],
        [(1, 0, 20)],
        [(1, 20, 13)],
        [(2, 0, 20)],
        [(2, 20, 20)],
        [(2, 40, 7), (3, 0, 8)],
        [(4, 0, 13)],
        [(5, 0, 20)],
        [(5, 20, 20)],
        [(5, 40, 1)],
        [(6, 0, 20)],
    ]
    assert [seq.output_ids for seq in seqs] == [bench.expected(seq) for seq in seqs]
    assert bench.is_clean()


def test_what_is_cached_of_a_prompt_counts_for_whether_it_fits() -> None:
    bench = Bench(max_batched_tokens=20, num_slots=8)
    bench.add(prompt(40), 1)
    bench.run()
    bench.add(prompt(4, 1), 1)
    bench.add(prompt(40), 1)  # all but its last block is cached
    bench.add(prompt(32) + prompt(30, 2), 1)  # as far
    plans = bench.run()
    assert chunks_of(plans) == [[(1, 0, 4), (2, 32, 8)], [(3, 32, 20)], [(3, 52, 10)]]
    assert bench.is_clean()


def test_a_long_prompt_starts_though_short_ones_keep_coming() -> None:
    bench = Bench(max_batched_tokens=20, num_slots=4)
    bench.add(prompt(12), 1)
    long = bench.add(prompt(50, 1), 1)
    for i in range(12):
        bench.add(prompt(7, i + 2), 1)
        bench.step()
        if i == 1:
            assert long.num_computed == 20
    assert long.status is SequenceStatus.FINISHED
    bench.run()
    assert bench.is_clean()


def test_a_decode_step_carries_every_running_sequence_with_its_drafts() -> None:
    bench = Bench(mtp=2)
    seqs = [bench.add(prompt(5 + i, i), 9) for i in range(3)]
    bench.step()
    plan = bench.step()
    assert [(s.position, s.num_tokens) for s in plan.decode] == [(5, 3), (6, 3), (7, 3)]
    bench.run()
    assert [seq.output_ids for seq in seqs] == [bench.expected(seq) for seq in seqs]


@pytest.mark.parametrize(("max_tokens", "widths"), [(1, []), (2, [1]), (3, [2])])
def test_no_drafts_beyond_the_end_of_the_output(max_tokens: int, widths: list[int]) -> None:
    bench = Bench(mtp=3, max_model_len=8 + max_tokens)
    bench.add(prompt(8), max_tokens)
    plans = bench.run()
    assert [s.num_tokens for plan in plans for s in plan.decode][: len(widths)] == widths
    assert all(s.position + s.num_tokens <= 7 + max_tokens for p in plans for s in p.decode)


def test_decodes_wait_for_a_bounded_number_of_prefill_steps() -> None:
    bench = Bench(max_batched_tokens=8, num_slots=4)
    bench.add(prompt(8), 12)
    bench.step()
    for i in range(6):
        bench.add(prompt(40, i + 1), 2)
    phases = [bench.step().phase for _ in range(20)]
    streak = longest = 0
    for phase in phases:
        streak = streak + 1 if phase == "prefill" else 0
        longest = max(longest, streak)
    assert longest == MAX_PREFILL_STREAK
    assert "decode" in phases[: MAX_PREFILL_STREAK + 1]


def test_requests_start_in_order_and_wait_for_slots() -> None:
    bench = Bench(num_slots=2)
    seqs = [bench.add(prompt(4, i), 3) for i in range(5)]
    bench.step()
    assert [seq.status for seq in seqs].count(SequenceStatus.WAITING) == 3
    plans = bench.run()
    started = [init.request_id for plan in bench.ranks.plans for init in plan.inits]
    assert started == [0, 1, 2, 3, 4]
    assert plans
    assert bench.is_clean()


# -- preemption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", [0, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_newest_is_preempted_and_loses_nothing(mtp: int, shards: int) -> None:
    bench = Bench(num_blocks=8, mtp=mtp, num_shards=shards, prefix_cache=False)
    penal = SamplingParams(temperature=1.0, seed=5, presence_penalty=1.0)
    seqs = [bench.add(prompt(9, i), 40, sampling=penal) for i in range(3)]
    bench.run()
    assert bench.scheduler.num_preemptions >= 2
    assert seqs[0].num_preemptions == 0  # the oldest always advances
    assert [seq.output_ids for seq in seqs] == [bench.expected(seq) for seq in seqs]
    again = [i for p in bench.ranks.plans for i in p.inits if i.request_id == 2]
    assert len(again) >= 2
    assert {init.num_prompt_tokens for init in again} == {9}  # output stays output
    assert bench.is_clean()


def test_drafts_are_given_up_before_somebody_is_preempted() -> None:
    """Two requests of exactly two blocks each fill the pool; only drafts would need more."""
    bench = Bench(num_blocks=4, mtp=3)
    for i in range(2):
        bench.add(prompt(8, i), 9)
    bench.run()
    assert bench.scheduler.num_preemptions == 0


def test_admission_leaves_room_for_those_who_run() -> None:
    """Else a request would start only to be preempted, again and again."""
    bench = Bench(num_blocks=4, max_batched_tokens=16, prefix_cache=False)
    first, second = (bench.add(prompt(16, i), 8) for i in range(2))  # three blocks each in the end
    bench.step()
    bench.step()
    assert (first.status, second.status) == (SequenceStatus.DECODE, SequenceStatus.WAITING)
    bench.run()
    assert bench.scheduler.num_preemptions == 0


def test_a_preempted_request_starts_again_before_those_who_wait() -> None:
    bench = Bench(num_blocks=5, num_slots=2, prefix_cache=False)
    for length, max_tokens in ((9, 23), (9, 17), (3, 2)):
        bench.add(prompt(length, length), max_tokens)
    plans = bench.run()
    assert [init.request_id for plan in plans for init in plan.inits] == [0, 1, 1, 2]


def test_history_is_sent_when_penalties_need_it() -> None:
    bench = Bench()
    first = bench.add(prompt(20), 2)
    bench.run()
    again = bench.add(prompt(20), 2, sampling=SamplingParams(frequency_penalty=0.5))
    init = bench.step().inits[0]
    assert (init.start, init.history) == (16, prompt(20)[:16])
    bench.run()
    assert first.cached_tokens == 0
    assert again.cached_tokens == 16
    assert again.output_ids == bench.expected(again)


# -- prefix cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 17, 23, 24, 25, 40])
def test_a_repeated_prompt_hits_as_far_as_it_can(length: int) -> None:
    """Also at multiples of the block size, where one token has to be left over (hit rate 0 %)."""
    bench = Bench(num_tails=4, tail_interval=1000)
    seqs = [bench.add(prompt(length), 3)]
    bench.run()
    seqs.append(bench.add(prompt(length), 3))
    bench.run()
    assert seqs[1].cached_tokens == (length - 1) // 8 * 8
    assert seqs[1].output_ids == seqs[0].output_ids == bench.expected(seqs[0])
    counters = bench.scheduler.prefix_counters
    assert (counters.queries, counters.hits) == (2 * length, (length - 1) // 8 * 8)


def test_tails_at_prompt_end_chunk_ends_and_intervals() -> None:
    bench = Bench(max_batched_tokens=24, tail_interval=2, num_tails=16, num_blocks=16)
    bench.add(prompt(70), 1)
    saves = [[t.position for t in s.save_tails] for p in bench.run() for s in p.prefill]
    assert saves == [[16, 24], [32, 48], [64]]


def test_two_requests_with_one_prefix_save_one_tail() -> None:
    bench = Bench()
    for _ in range(2):
        bench.add(prompt(17), 1)
    plan = bench.step()
    assert [[t.position for t in s.save_tails] for s in plan.prefill] == [[16], []]


def test_nothing_is_published_before_its_step_succeeded() -> None:
    bench = Bench(max_batched_tokens=16)
    bench.add(prompt(40), 1)
    plan = bench.scheduler.schedule()
    assert plan is not None
    assert plan.prefill[0].save_tails
    blocks = bench.scheduler.placement.blocks
    assert (blocks.num_cached, blocks.tails.num_attached) == (0, 0)
    bench.scheduler.postprocess(bench.ranks.execute(plan))
    assert (blocks.num_cached, blocks.tails.num_attached) == (2, 1)


def test_scarce_tails_are_reused_oldest_first() -> None:
    bench = Bench(num_tails=1)
    for i in (0, 1, 1, 0):
        seq = bench.add(prompt(17, i), 1)
        bench.run()
        assert seq.output_ids == bench.expected(seq)
    assert bench.scheduler.prefix_counters.hits == 16  # the second of request 1 only


@pytest.mark.parametrize("mtp", [0, 1, 3])
def test_decode_saves_the_boundary_it_crossed_and_the_next_turn_uses_it(mtp: int) -> None:
    """A finished request's last boundary is saved by the next plan, before its slot is reused."""
    bench = Bench(mtp=mtp, num_slots=1, tail_interval=2, num_tails=8, num_blocks=16)
    seq = bench.add(prompt(6), 27)
    bench.run()
    saved = [op.position for plan in bench.ranks.plans for op in plan.saves]
    assert saved == [16]  # 32 was crossed by the last step: the next plan's business
    for end in (33, 32, 24, 17):
        turn = [*seq.token_ids[:end], 5, 6, 7]
        following = bench.add(turn, 2)
        bench.run()
        assert following.cached_tokens == min(end, 32) // 16 * 16
        assert following.output_ids == bench.expected(following)


def test_the_end_of_an_output_is_saved_with_the_next_plan() -> None:
    """The output ends in the step that crosses a boundary; a reader may start in that very plan."""
    bench = Bench(num_slots=1, tail_interval=1000)
    seq = bench.add(prompt(6), 11)  # 16 of 17 tokens are computed
    bench.run()
    following = bench.add([*seq.token_ids[:16], 3], 2)
    plan = bench.step()
    assert plan.saves == [TailOp(slot=0, position=16, tail=plan.saves[0].tail)]
    assert plan.inits[0].restore_tail == plan.saves[0].tail
    assert plan.inits[0].slot == 0
    bench.run()
    assert following.cached_tokens == 16
    assert following.output_ids == bench.expected(following)


def test_drafts_behind_a_stop_token_are_not_published() -> None:
    """They were accepted and computed, but they are no part of the sequence."""
    whole = Bench().add(prompt(6), 40)
    want = reference(prompt(6), whole.request.sampling, max_tokens=40, vocab=VOCAB)
    for end in range(30):
        bench = Bench(mtp=3)
        seq = bench.add(prompt(6), 40, stop_token_ids=frozenset({want[end]}))
        bench.run()
        assert seq.finish_reason is FinishReason.STOP
        assert bench.scheduler.placement.blocks.num_cached <= seq.num_tokens // 8
        assert seq.num_tokens // 8 == len(seq.chain) or len(seq.chain) == (seq.num_tokens - 1) // 8
        following = bench.add([*seq.token_ids, 5, 6], 2)
        bench.run()
        assert following.output_ids == bench.expected(following)


def test_a_tail_is_kept_only_until_it_was_read() -> None:
    bench = Bench(max_batched_tokens=8)
    bench.add(prompt(17), 1)
    bench.run()
    tails = bench.scheduler.placement.blocks.tails
    seq = bench.add([*prompt(17), *prompt(20)], 1)
    bench.scheduler.schedule()
    assert (seq.num_computed, tails.num_pinned) == (16, 1)
    bench.scheduler.drop_running()
    assert tails.num_pinned == 0
    bench = Bench(max_batched_tokens=8)
    bench.add(prompt(17), 1)
    bench.run()
    seq = bench.add([*prompt(17), *prompt(20)], 1)
    bench.step()
    assert (seq.cached_tokens, seq.num_computed) == (16, 24)
    assert bench.scheduler.placement.blocks.tails.num_pinned == 0


def test_two_requests_that_cross_one_boundary_save_one_tail() -> None:
    bench = Bench()
    for _ in range(2):
        bench.add(prompt(6), 20)
    plans = bench.run()
    assert [len(plan.saves) for plan in plans if plan.saves] == [1]


def test_a_boundary_crossed_earlier_is_not_saved() -> None:
    bench = Bench(num_slots=1, tail_interval=1000)
    bench.add(prompt(6), 13)  # ends two steps after the boundary
    bench.run()
    bench.add(prompt(3, 9), 1)
    assert bench.step().saves == []


def test_saves_of_prefill_are_typed_as_the_protocol_says() -> None:
    bench = Bench()
    bench.add(prompt(9), 1)
    assert bench.step().prefill[0].save_tails == [TailSave(position=8, tail=0)]


def test_prompt_logprobs_skip_no_token() -> None:
    bench = Bench()
    bench.add(prompt(17), 1)
    bench.run()
    seq = bench.add(prompt(17), 1, sampling=SamplingParams(prompt_logprobs=0))
    plan = bench.scheduler.schedule()
    assert plan is not None
    assert plan.inits[0].start == 0
    update = bench.scheduler.postprocess(bench.ranks.execute(plan))[0]
    assert [item.logprob for item in update.prompt_logprobs] == [-float(i) for i in range(1, 17)]
    assert seq.is_finished


def test_without_prefix_cache_nothing_is_kept() -> None:
    bench = Bench(prefix_cache=False)
    for _ in range(2):
        bench.add(prompt(30), 20)
        bench.run()
    assert bench.scheduler.placement.blocks.num_cached == 0
    assert not any(p.saves or s.save_tails for p in bench.ranks.plans for s in p.prefill)
    assert bench.scheduler.prefix_counters.queries == 0


# -- admission, ends, failures --------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    bench = Bench(num_blocks=4, max_model_len=64)
    with pytest.raises(RequestError, match=r"5 KV blocks of 8 tokens \(33 tokens\); .* has 4"):
        bench.add(prompt(30), 3)
    with pytest.raises(RequestError, match=r"65 tokens .*; max_model_len is 64"):
        bench.add(prompt(60), 5)
    biggest = bench.add(prompt(30), 2)  # and what passes the check does run
    bench.run()
    assert biggest.num_output_tokens == 2


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_largest_request_runs_on_every_sharding(shards: int) -> None:
    bench = Bench(num_blocks=7, num_shards=shards, mtp=3, max_model_len=56)
    seqs = [bench.add(prompt(length, length), 56 - length) for length in (1, 20, 55)]
    bench.run()
    assert [seq.output_ids for seq in seqs] == [bench.expected(seq) for seq in seqs]
    assert bench.is_clean()


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_finish_frees_at_once(steps: int) -> None:
    bench = Bench(max_batched_tokens=16)
    seq = bench.add(prompt(24), 8)
    for _ in range(steps):
        bench.step()
    bench.scheduler.finish(seq, FinishReason.ABORT)
    assert bench.is_clean()
    assert not bench.scheduler.has_work
    assert bench.scheduler.schedule() is None
    bench.scheduler.finish(seq, FinishReason.STOP)  # the reason only
    assert seq.finish_reason is FinishReason.STOP


def test_drop_running_keeps_those_who_wait() -> None:
    bench = Bench(num_slots=1)
    ran, waits = bench.add(prompt(20), 4), bench.add(prompt(9, 1), 4)
    bench.step()
    bench.scheduler.schedule()
    assert bench.scheduler.drop_running() == [ran]
    bench.scheduler.reset(bench.limits)
    bench.ranks.restart(lambda line: None)
    bench.ranks.ref_count = bench.scheduler.placement.blocks.ref_count
    assert bench.scheduler.placement.blocks.num_cached == 0
    bench.run()
    assert waits.output_ids == bench.expected(waits)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"step_id": 99}, "answered step 99"),
        ({"outputs": []}, r"answered requests \[\]"),
        ({"outputs": [SliceOutput(request_id=7, token_ids=[1])]}, r"requests \[7\]"),
        ({"outputs": [SliceOutput(request_id=0)]}, "0 tokens from a prefill chunk, 1 expected"),
        ({"outputs": [SliceOutput(request_id=0, token_ids=[97])]}, "token id 97 is not in 0..96"),
        ({"outputs": [SliceOutput(request_id=0, token_ids=[-1])]}, "token id -1"),
    ],
)
def test_an_answer_that_does_not_fit_the_plan(change: dict[str, object], expected: str) -> None:
    bench = Bench()
    seq = bench.add(prompt(5), 4)
    plan = bench.scheduler.schedule()
    assert plan is not None
    good = {"step_id": 0, "rank": 0, "outputs": [SliceOutput(request_id=0, token_ids=[1])]}
    with pytest.raises(WorkerFailure, match=expected):
        bench.scheduler.postprocess(StepOutput(**{**good, **change}))  # type: ignore[arg-type]
    assert seq.num_computed == 0
    assert seq.num_output_tokens == 0


def test_too_few_logits() -> None:
    bench = Bench()
    bench.add(prompt(5), 0, score=ScoreSpec(mtp=True))
    plan = bench.scheduler.schedule()
    assert plan is not None
    good = bench.ranks.execute(plan).outputs[0]
    for name, rows in (("logits", 5), ("mtp_logits", 4)):
        short = msgspec.structs.replace(good, **{name: getattr(good, name)[:-4]})
        with pytest.raises(WorkerFailure, match=f" of {name}, {rows} rows of 388 expected"):
            bench.scheduler.postprocess(StepOutput(step_id=0, rank=0, outputs=[short]))


def test_one_step_at_a_time() -> None:
    bench = Bench()
    bench.add(prompt(5), 4)
    with pytest.raises(RuntimeError, match="no step is in flight"):
        bench.scheduler.postprocess(StepOutput(step_id=0, rank=0))
    bench.scheduler.schedule()
    with pytest.raises(RuntimeError, match="step 0 is still in flight"):
        bench.scheduler.schedule()


# -- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("decode_from", [1, 9])
def test_scoring_steps_stay_within_the_logit_budget(
    mtp: bool, decode_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.limits.LOGIT_BYTES", 6 * 4 * VOCAB)
    bench = Bench(num_slots=8)
    spec = ScoreSpec(decode_from=decode_from, mtp=mtp)
    for i in range(7):
        bench.add(prompt(13, i), 0, score=spec)
    plain = bench.add(prompt(30, 7), 3)
    plans = bench.run()
    for plan in plans:
        rows = sum(len(s.token_ids) for s in plan.prefill if s.logits)
        rows += sum(s.num_tokens for s in plan.decode if s.logits)
        assert rows * (1 + mtp) <= 6
    assert plain.output_ids == bench.expected(plain)
    assert bench.is_clean()


def test_scoring_reads_and_leaves_no_prefix() -> None:
    bench = Bench()
    bench.add(prompt(40), 1)
    bench.run()
    cached = bench.scheduler.placement.blocks.num_cached
    bench.add(prompt(40), 0, score=ScoreSpec(decode_from=20))
    bench.add(prompt(40, 3), 0, score=ScoreSpec())
    plans = bench.run()
    assert all(init.start == 0 for plan in plans for init in plan.inits)
    assert not any(plan.saves or s.save_tails for plan in plans for s in plan.prefill)
    assert bench.scheduler.placement.blocks.num_cached == cached


def test_scoring_is_never_preempted() -> None:
    bench = Bench(num_blocks=8, prefix_cache=False)
    plain = bench.add(prompt(8), 40)
    score = bench.add(prompt(32, 1), 0, score=ScoreSpec(decode_from=2))
    bench.run()
    assert score.num_preemptions == 0
    assert plain.num_preemptions == 1
    assert plain.output_ids == bench.expected(plain)
