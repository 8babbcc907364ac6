"""What a plan holds: chunks, drafts, fairness, preemption, admission, scoring; driven by mock ranks."""

from __future__ import annotations

import msgspec
import pytest

from cluster.errors import RequestError, WorkerFailure
from cluster.scheduler import MAX_PREFILL_STREAK
from cluster.sequence import FinishReason, ScoreSpec, SequenceStatus
from tests.helpers.scheduler_bench import VOCAB, Bench, chunks_of, prompt
from worker.protocol import (
    SamplingParams,
    SliceOutput,
    StepOutput,
)


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
