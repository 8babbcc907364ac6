"""The engine on mock ranks: one output whatever runs beside it, one end per request, no leaks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import RequestError
from cluster.events import RequestEvent
from cluster.params import GenerationParams
from cluster.sequence import FinishReason
from tests.helpers.engine_bench import (
    VOCAB,
    assert_clean,
    build,
    collect,
    expected,
)


def make_requests(seed: int, count: int) -> list[tuple[list[int], GenerationParams]]:
    """Prompts with common beginnings, of all kinds of length, greedy and sampled."""
    rng = random.Random(seed)
    stem = [rng.randrange(2, VOCAB) for _ in range(64)]
    requests = []
    for _ in range(count):
        own = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 12))]
        prompt = stem[: rng.choice([0, 7, 8, 9, 16, 24, 33, 40])] + own
        params = GenerationParams(
            max_tokens=rng.choice([1, 2, 9, 17, 40]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            seed=rng.randrange(100),
            presence_penalty=rng.choice([0.0, 0.0, 1.5]),
            ignore_eos=rng.random() < 0.5,
            min_tokens=rng.choice([0, 1]),
            cache_salt=rng.choice([b"", b"", b"other"]),
        )
        requests.append((prompt, params))
    return requests


# -- the same output whatever runs beside it ------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_output_does_not_depend_on_company(data: st.DataObject) -> None:
    """Batches, chunks, prefix hits, preemption, MTP, sharding, arrivals and aborts at any time."""
    draw = data.draw
    shards = draw(st.sampled_from([1, 2, 3]), "shards")
    engine, _ = build(
        mtp=draw(st.integers(0, 3), "mtp"),
        num_blocks=draw(st.integers(12, 20), "num_blocks"),
        num_slots=draw(st.integers(1, 5), "num_slots"),
        num_tails=draw(st.integers(0, 6), "num_tails"),
        num_shards=shards,
        max_model_len=96,
        max_batched_tokens=draw(st.sampled_from([3, 8, 13, 64]), "max_batched_tokens"),
        prefix_cache=draw(st.booleans(), "prefix_cache"),
        tail_interval=draw(st.integers(1, 3), "tail_interval"),
    )
    requests = make_requests(draw(st.integers(0, 10**6), "seed"), draw(st.integers(1, 8), "count"))
    late = draw(st.lists(st.integers(0, 6), min_size=len(requests), max_size=len(requests)), "late")
    aborts = draw(st.sets(st.integers(0, len(requests) - 1), max_size=2), "aborts")
    outputs: dict[int, list[int]] = {}
    ends: dict[int, FinishReason] = {}
    which: dict[int, int] = {}

    def take(events: list[RequestEvent]) -> None:
        for event in events:
            assert event.request_id not in ends
            outputs[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                ends[event.request_id] = event.finish_reason

    for index, (prompt, params) in enumerate(requests):
        request_id = engine.add_request(prompt, params)
        which[request_id], outputs[request_id] = index, []
        for _ in range(late[index]):
            take(engine.step())
        if index in aborts:
            engine.abort(request_id)
    while engine.has_work:
        take(engine.step())
    for request_id, index in which.items():
        prompt, params = requests[index]
        want = expected(prompt, params)
        if ends[request_id] is FinishReason.ABORT:
            assert index in aborts
            assert want[: len(outputs[request_id])] == outputs[request_id]
        else:
            assert outputs[request_id] == want
    assert_clean(engine)


@pytest.mark.parametrize("mtp", [0, 1, 3])
def test_preemption_and_prefix_hits_do_happen_in_these_tests(mtp: int) -> None:
    engine, executor = build(mtp=mtp, num_blocks=12, num_tails=6, max_model_len=96)
    requests = make_requests(11, 60)
    out = collect(engine.generate([p for p, _ in requests], [p for _, p in requests]), 60)
    assert out == [expected(*request) for request in requests]
    stats = engine.stats
    assert stats.num_preemptions >= 3
    assert stats.prefix_hits > 200
    assert any(plan.saves for plan in executor.plans)
    assert (stats.drafts_proposed > 0) == (mtp > 0)
    if mtp:
        assert 0.3 < stats.acceptance < 0.9
    assert set(stats.finished) == {"stop", "length"}
    assert sum(stats.finished.values()) == 60
    assert_clean(engine)


def test_unseeded_requests_get_a_fixed_seed_of_their_own() -> None:
    """Two equal requests differ; alone, a request draws what it draws in a batch."""
    params = GenerationParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    engine, executor = build()
    both = collect(engine.generate([[5, 6], [5, 6]], params), 2)
    assert both[0] != both[1]
    seeds = [init.sampling.seed for plan in executor.plans for init in plan.inits]
    assert len(set(seeds)) == 2
    engine, _ = build()
    alone = collect(engine.generate([[5, 6]], params), 1)
    assert alone[0] == both[0]


def test_salted_requests_share_nothing_with_others() -> None:
    engine, _ = build()
    prompt = list(range(2, 40))
    hits = []
    for salt in (b"", b"a", b"b", b"a", b""):
        events = list(engine.generate([prompt], GenerationParams(max_tokens=1, cache_salt=salt)))
        hits.append(events[-1].cached_tokens)
    assert hits == [0, 0, 0, 32, 32]


# -- life of a request ----------------------------------------------------------------------------


def test_a_thousand_aborts_leak_nothing() -> None:
    engine, _ = build(mtp=2, num_blocks=16, num_slots=4, max_model_len=96)
    rng = random.Random(1)
    requests = make_requests(2, 1000)
    ids: list[int] = []
    ended: list[int] = []
    for prompt, params in requests:
        ids.append(engine.add_request(prompt, replace(params, max_tokens=40)))
        for _ in range(rng.choice([0, 0, 1, 2])):
            ended += [event.request_id for event in engine.step() if event.finished]
        if len(ids) > 3:
            victim = ids.pop(rng.randrange(len(ids)))
            engine.abort(victim)
            assert not engine.abort(victim)
    for request_id in ids:
        engine.abort(request_id)
    ended += [event.request_id for event in engine.step() if event.finished]
    assert sorted(ended) == list(range(1000))
    assert_clean(engine)


def test_an_aborted_requests_slot_serves_the_next_one() -> None:
    engine, executor = build(num_slots=1)
    first = engine.add_request([5] * 20, GenerationParams(max_tokens=30, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.abort(first)
    events = list(engine.generate([[6] * 9], GenerationParams(max_tokens=3, ignore_eos=True)))
    assert [i.slot for plan in executor.plans for i in plan.inits] == [0, 0]
    assert [i for event in events for i in event.token_ids] == expected(
        [6] * 9, GenerationParams(max_tokens=3, ignore_eos=True)
    )


def test_events_report_counts_timings_and_logprobs() -> None:
    engine, _ = build(mtp=2, max_batched_tokens=4)
    params = GenerationParams(max_tokens=9, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    events = list(engine.generate([[5, 6, 7, 8, 9, 10]], params))
    assert [item.logprob for e in events for item in e.logprobs] == [
        -float(i) for i in range(6, 15)
    ]
    assert [item.token_id for e in events for item in e.prompt_logprobs] == [6, 7, 8, 9, 10]
    last = events[-1]
    assert (last.num_prompt_tokens, last.num_output_tokens, last.cached_tokens) == (6, 9, 0)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.timings is not None
    assert 0 < last.timings.queue_s < last.timings.ttft_s < last.timings.e2e_s
    assert all(event.timings is None for event in events[:-1])
    assert engine.stats.decode_tokens_per_s > 0
    assert engine.stats.prefill_tokens == 6


def test_logprobs_survive_preemption_once() -> None:
    engine, _ = build(num_blocks=8, prefix_cache=False, mtp=1)
    params = GenerationParams(max_tokens=40, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    prompts = [[5 + i] * 9 for i in range(3)]
    chosen: list[list[float]] = [[], [], []]
    known: list[list[int]] = [[], [], []]
    for event in engine.generate(prompts, params):
        chosen[event.index] += [item.logprob for item in event.logprobs]
        known[event.index] += [item.token_id for item in event.prompt_logprobs]
    assert engine.stats.num_preemptions > 0
    assert chosen == [[-float(i) for i in range(9, 49)]] * 3
    assert known == [prompt[1:] for prompt in prompts]


def test_max_tokens_defaults_to_what_fits() -> None:
    engine, _ = build(num_blocks=6, max_model_len=40)
    out = collect(engine.generate([[5] * 10], GenerationParams(ignore_eos=True)), 1)
    assert len(out[0]) == 30
    engine, _ = build(num_blocks=3, max_model_len=40)
    assert len(collect(engine.generate([[5] * 10], GenerationParams(ignore_eos=True)), 1)[0]) == 14


def test_iterators_can_be_read_in_turn_and_left_early() -> None:
    engine, _ = build()
    params = GenerationParams(max_tokens=6, ignore_eos=True)
    one = engine.generate([[5], [6]], params)
    two = engine.generate([[7]], params)
    plain = engine.add_request([8], params)
    gone = engine.generate([[9]], params)
    next(gone)
    gone.close()
    first = [next(one)]
    assert collect(two, 1) == [expected([7], params)]
    rest = collect(iter([*first, *one]), 2)
    assert rest == [expected([5], params), expected([6], params)]
    news = engine.step()
    while engine.has_work:
        news += engine.step()
    assert {event.request_id for event in news} == {plain}
    assert [i for event in news for i in event.token_ids] == expected([8], params)
    assert_clean(engine)


def test_all_of_a_call_or_nothing_is_queued() -> None:
    engine, _ = build()
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate([[5], []])
    assert not engine.scheduler.has_work
