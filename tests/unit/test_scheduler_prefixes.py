"""What plans do for the prefix cache: hits, saved tails, published blocks; driven by mock ranks."""

from __future__ import annotations

import pytest

from cluster.sequence import FinishReason
from tests.helpers.mock_executor import reference
from tests.helpers.scheduler_bench import VOCAB, Bench, prompt
from worker.protocol import (
    SamplingParams,
    TailOp,
    TailSave,
)


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
