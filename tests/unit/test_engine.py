"""The engine on mock ranks: one output whatever runs beside it, one end per request, no leaks."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine import EngineConfig, LLMEngine
from cluster.errors import EngineDead, RequestError, WorkerFailure
from cluster.events import RequestEvent, ScoreRequest
from cluster.params import GenerationParams
from cluster.sequence import FinishReason
from cluster.tokenizer import Tokenizer
from model.parallel.config import ParallelConfig
from tests.helpers.byte_tokenizer import FIRST_BYTE, VOCAB_SIZE, byte_tokenizer_json
from tests.helpers.mock_executor import MockExecutor, logit_row, reference
from worker.config import KVCacheConfig, SchedulerConfig, SpeculativeConfig, WorkerConfig
from worker.protocol import SamplingParams

VOCAB = 97
EOS = 1
TOKENIZER = Tokenizer(byte_tokenizer_json())


class Clock:
    """Advances by a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def build(
    *,
    tokenizer: Tokenizer | None = None,
    max_batched_tokens: int = 64,
    max_num_seqs: int = 8,
    prefix_cache: bool = True,
    tail_interval: int = 2,
    max_rebuilds: int = 3,
    vocab: int = VOCAB,
    **ranks: int,
) -> tuple[LLMEngine, MockExecutor]:
    """A started engine and its mock ranks, which check who owns the blocks they write."""
    executor = MockExecutor(vocab=vocab, max_batched_tokens=max_batched_tokens, **ranks)
    shards = executor.num_shards
    worker = WorkerConfig(
        parallel=ParallelConfig(cp=shards, kv_shard="cp" if shards > 1 else "replicate"),
        kv_cache=KVCacheConfig(tail_interval=tail_interval),
        scheduler=SchedulerConfig(
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
            prefix_cache=prefix_cache,
        ),
        speculative=SpeculativeConfig(mtp=executor.mtp),
    )
    config = EngineConfig(
        worker=worker, vocab_size=vocab, eos_token_ids=(EOS,), max_rebuilds=max_rebuilds, seed=3
    )
    engine = LLMEngine(config, executor, tokenizer, clock=Clock())
    engine.start()
    executor.ref_count = lambda block: engine.scheduler.placement.blocks.ref_count(block)
    return engine, executor


def expected(prompt: list[int], params: GenerationParams, vocab: int = VOCAB) -> list[int]:
    stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
    return reference(
        prompt,
        SamplingParams(
            temperature=params.temperature,
            seed=params.seed or 0,
            presence_penalty=params.presence_penalty,
        ),
        max_tokens=params.max_tokens or 10**9,
        min_tokens=params.min_tokens,
        vocab=vocab,
        stop=stop,
    )


def assert_clean(engine: LLMEngine) -> None:
    scheduler = engine.scheduler
    assert scheduler.placement.blocks.num_free == scheduler.limits.num_blocks
    assert scheduler.placement.num_free_slots == scheduler.limits.num_slots
    assert scheduler.placement.blocks.tails.num_pinned == 0
    assert scheduler.placement.blocks.tails.num_taken == 0
    assert not scheduler.sequences
    assert not engine.has_work


def collect(events: Iterator[RequestEvent], count: int) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(count)]
    ends = [0] * count
    for event in events:
        assert not ends[event.index], "news after the end"
        out[event.index] += event.token_ids
        ends[event.index] += event.finished
    assert ends == [1] * count
    return out


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


# -- text -----------------------------------------------------------------------------------------


def text_run(prompt: str, **options: object) -> tuple[str, RequestEvent, list[int], MockExecutor]:
    engine, executor = build(tokenizer=TOKENIZER, vocab=VOCAB_SIZE, mtp=2)
    params = GenerationParams(**{"max_tokens": 60, "ignore_eos": True, **options})  # type: ignore[arg-type]
    events = list(engine.generate([prompt], params))
    assert_clean(engine)
    text = "".join(event.text for event in events)
    return text, events[-1], [i for event in events for i in event.token_ids], executor


def test_text_is_the_decoded_output() -> None:
    text, last, ids, executor = text_run("hé")
    assert executor.plans[0].prefill[0].token_ids == [0, *(FIRST_BYTE + b for b in "hé".encode())]
    assert text == TOKENIZER.decode(ids)
    assert last.finish_reason is FinishReason.LENGTH


def test_a_stop_string_ends_text_and_tokens() -> None:
    """Also where accepted drafts of the same step lie behind it."""
    whole, _, ids, _ = text_run("hello")
    for at in range(len(whole) - 2):
        stop = whole[at : at + 2]
        text, last, used, _ = text_run("hello", stop=("never there", stop))
        assert text == whole[: whole.index(stop)]
        assert last.finish_reason is FinishReason.STOP
        assert used == ids[: len(used)]
        assert last.num_output_tokens == len(used)
        assert stop in TOKENIZER.decode(used)
        assert stop not in TOKENIZER.decode(used[:-1]) or stop.endswith("\ufffd")


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    whole, _, _, _ = text_run("hello")
    text, last, _, _ = text_run("hello", stop=(whole[-2:] + "and more",))
    assert text == whole
    assert last.finish_reason is FinishReason.LENGTH


def test_a_stop_token_is_counted_but_not_shown() -> None:
    whole, _, ids, _ = text_run("x")
    stop = ids[10]
    text, last, used, _ = text_run("x", stop_token_ids=(stop,))
    end = ids.index(stop)
    assert used == ids[: end + 1]
    assert text == TOKENIZER.decode(ids[:end])
    assert last.finish_reason is FinishReason.STOP
    assert whole.startswith(text[:3])


# -- refusals -------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_PARAMS = [
    ("temperature", (-0.1, NAN, INF, "1", True, 10**400)),
    ("top_p", (0.0, 1.1, NAN, -1)),
    ("min_p", (-0.1, 1.1, NAN)),
    ("top_k", (-1, 1.5, 2**63, NAN)),
    ("presence_penalty", (-2.1, 2.1, NAN)),
    ("frequency_penalty", (-2.1, 2.1, INF)),
    ("repetition_penalty", (0.0, -1.0, INF, NAN)),
    ("max_tokens", (0, -1, 1.0, 2**63, True)),
    ("min_tokens", (-1, 11, 2**63)),
    ("seed", (-1, 2**63, 1.5)),
    ("logprobs", (-1, 21, 2**63, 1.0)),
    ("prompt_logprobs", (-1, 21)),
    ("stop_token_ids", ((VOCAB_SIZE,), (-1,), (1,) * 129, (1.0,), (2**63,))),
    ("stop", (("",), ("x" * 257,), ("a",) * 17, ("\ud800",), (5,))),
    ("cache_salt", (b"x" * 257,)),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_PARAMS for value in values]
)
def test_parameter_bombs(name: str, value: object) -> None:
    engine, _ = build(tokenizer=TOKENIZER, vocab=VOCAB_SIZE)
    with pytest.raises(RequestError, match=name) as caught:
        engine.add_request([5], replace(GenerationParams(max_tokens=10), **{name: value}))
    assert len(str(caught.value)) < 200
    assert not engine.has_work


@pytest.mark.parametrize(
    ("prompt", "expected_text"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ("a\ud800b", r"lone surrogate \(U\+D800\) at character 1"),
        ([5, VOCAB_SIZE], rf"prompt\[1\] must be an integer in 0..{VOCAB_SIZE - 1}"),
        ([-1], "-1"),
        ([2**63], r"prompt\[0\]"),
        ([1.0], r"prompt\[0\]"),
        ([True], r"prompt\[0\]"),
        (["5"], r"prompt\[0\]"),
        ([5] * 256, "256 tokens, at most 255 are allowed .max_model_len 256, 32 KV blocks of 8"),
        ("x" * 10**6, "1000000 bytes"),
    ],
)
def test_bad_prompts(prompt: str | list[int], expected_text: str) -> None:
    engine, _ = build(tokenizer=TOKENIZER, vocab=VOCAB_SIZE)
    with pytest.raises(RequestError, match=expected_text):
        engine.add_request(prompt)
    assert not engine.has_work


def test_too_many_tokens_to_generate() -> None:
    engine, _ = build(num_blocks=8)
    with pytest.raises(RequestError, match="the request needs 9 KV blocks of 8 tokens"):
        engine.add_request([5] * 10, GenerationParams(max_tokens=60))
    with pytest.raises(RequestError, match="min_tokens is 60, but only 54 tokens fit"):
        engine.add_request([5] * 10, GenerationParams(min_tokens=60))


def test_without_a_tokenizer_only_ids_are_served() -> None:
    engine, _ = build()
    with pytest.raises(RequestError, match="a text prompt needs a tokenizer"):
        engine.add_request("hello")
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.add_request([5], GenerationParams(stop=("x",)))


def test_nul_and_odd_text_is_served() -> None:
    text, last, _, _ = text_run("\0\u202e\ufdd0 \U0001f600", max_tokens=2)
    assert last.finish_reason is FinishReason.LENGTH
    assert isinstance(text, str)


# -- failures -------------------------------------------------------------------------------------


def test_a_failure_costs_those_who_ran_and_nobody_else() -> None:
    engine, executor = build(num_slots=2, mtp=1)
    params = GenerationParams(max_tokens=10, ignore_eos=True)
    ids = [engine.add_request([5 + i] * 9, params) for i in range(4)]
    executor.fail_on = {2}
    out: dict[int, list[int]] = {i: [] for i in ids}
    ends: dict[int, RequestEvent] = {}
    failed_at = -1
    while engine.has_work:
        for event in engine.step():
            out[event.request_id] += event.token_ids
            if event.finished:
                assert event.request_id not in ends
                ends[event.request_id] = event
                if event.error:
                    failed_at = executor.starts
    assert failed_at == 1  # told before the ranks are rebuilt
    assert executor.starts == 2
    assert engine.stats.num_rebuilds == 1
    reasons = [ends[i].finish_reason for i in ids]
    assert reasons == [FinishReason.ERROR] * 2 + [FinishReason.LENGTH] * 2
    assert ends[0].error == "rank 1 failed in decode of step 2: killed by the test"
    for index in (2, 3):
        assert out[ids[index]] == expected([5 + index] * 9, params)
    assert_clean(engine)


def test_a_preempted_request_outlives_a_failure() -> None:
    """It holds nothing on the ranks, so it is one of those who wait."""
    engine, executor = build(num_blocks=8, prefix_cache=False)
    params = GenerationParams(max_tokens=40, ignore_eos=True)
    events = engine.generate([[5 + i] * 9 for i in range(3)], params)
    tokens: list[list[int]] = [[], [], []]
    reasons: list[FinishReason | None] = [None] * 3
    for event in events:
        tokens[event.index] += event.token_ids
        reasons[event.index] = event.finish_reason
        if engine.stats.num_preemptions and not executor.fail_on:
            executor.fail_on = {executor.calls}
    assert reasons[0] is FinishReason.ERROR
    assert reasons[2] is FinishReason.LENGTH
    assert tokens[2] == expected([7] * 9, params)


def test_cached_prefixes_die_with_the_ranks() -> None:
    engine, executor = build()
    params = GenerationParams(max_tokens=2, ignore_eos=True)
    prompt = list(range(2, 30))
    list(engine.generate([prompt], params))
    executor.fail_on = {executor.calls}
    list(engine.generate([[5]], params))
    last = list(engine.generate([prompt], params))[-1]
    assert last.cached_tokens == 0
    assert last.finish_reason is FinishReason.LENGTH
    assert list(engine.generate([prompt], params))[-1].cached_tokens == 24


@pytest.mark.parametrize("max_rebuilds", [0, 2])
def test_too_many_failures_end_the_engine_and_every_request(max_rebuilds: int) -> None:
    engine, executor = build(num_slots=1, max_rebuilds=max_rebuilds)
    executor.fail_on = set(range(100))
    ids = [engine.add_request([5]) for _ in range(6)]
    ends: list[int] = []
    while engine.has_work:
        ends += [e.request_id for e in engine.step() if e.finish_reason is FinishReason.ERROR]
    assert sorted(ends) == ids
    assert executor.starts == 1 + max_rebuilds
    for call in (engine.step, lambda: engine.add_request([5])):
        with pytest.raises(EngineDead, match=f"{max_rebuilds + 1} failures in 600 s"):
            call()


def test_old_failures_are_forgotten() -> None:
    engine, executor = build(max_rebuilds=1)
    params = GenerationParams(max_tokens=3, ignore_eos=True)
    for _ in range(5):
        executor.fail_on = {executor.calls}
        assert list(engine.generate([[5]], params))[-1].finish_reason is FinishReason.ERROR
        engine._clock.now += 700  # type: ignore[attr-defined]
    assert list(engine.generate([[5]], params))[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats.num_rebuilds == 5


def test_a_failing_rebuild_counts_too() -> None:
    engine, executor = build(max_rebuilds=3)
    params = GenerationParams(max_tokens=3, ignore_eos=True)
    executor.fail_on = {0}
    executor.fail_restarts = 2
    list(engine.generate([[5]], params))
    assert list(engine.generate([[5]], params))[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats.num_rebuilds == 1
    executor.fail_on = {executor.calls}
    assert list(engine.generate([[5]], params))[-1].finish_reason is FinishReason.ERROR
    with pytest.raises(EngineDead, match="4 failures"):
        engine.step()


def test_ranks_that_come_back_smaller() -> None:
    engine, executor = build(num_slots=1, num_blocks=16)
    params = GenerationParams(max_tokens=4, ignore_eos=True)
    ids = [engine.add_request(prompt, params) for prompt in ([5], [6] * 60, [7])]
    executor.fail_on = {0}
    executor.info = type(executor.info)(
        **{
            **{f: getattr(executor.info, f) for f in executor.info.__struct_fields__},
            "num_blocks": 4,
        }
    )
    ends = {}
    while engine.has_work:
        ends |= {e.request_id: e for e in engine.step() if e.finished}
    assert [ends[i].finish_reason for i in ids] == [
        FinishReason.ERROR,
        FinishReason.ERROR,
        FinishReason.LENGTH,
    ]
    assert "needs 8 KV blocks" in ends[1].error


def test_shutdown_ends_everything_once() -> None:
    engine, executor = build(num_slots=1)
    ids = [engine.add_request([5], GenerationParams(max_tokens=9)) for _ in range(3)]
    engine.step()
    last = engine.shutdown()
    assert sorted(event.request_id for event in last) == ids
    assert {event.finish_reason for event in last} == {FinishReason.ABORT}
    assert not executor.alive
    assert not engine.has_work
    with pytest.raises(EngineDead, match="was shut down"):
        engine.add_request([5])
    assert engine.shutdown() == []


# -- scoring --------------------------------------------------------------------------------------


def score_rows(engine: LLMEngine, requests: list[ScoreRequest]) -> list[tuple[bytes, bytes]]:
    rows: list[tuple[bytes, bytes]] = [(b"", b"")] * len(requests)
    done = [0] * len(requests)
    positions = [0] * len(requests)
    for item in engine.score(requests):
        assert item.start == positions[item.index]
        assert not done[item.index]
        positions[item.index] += item.num_rows
        assert len(item.logits) == item.num_rows * 4 * VOCAB
        assert len(item.mtp_logits) == item.num_mtp_rows * 4 * VOCAB
        logits, mtp = rows[item.index]
        rows[item.index] = (logits + item.logits, mtp + item.mtp_logits)
        done[item.index] += item.finished
    assert done == [1] * len(requests)
    return rows


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("max_batched_tokens", [5, 64])
def test_score_gives_every_row_once(
    mtp: int, max_batched_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.limits.LOGIT_BYTES", 13 * 4 * VOCAB)
    engine, executor = build(mtp=mtp, max_batched_tokens=max_batched_tokens, num_blocks=16)
    texts = [[(3 + 5 * i + j) % VOCAB for j in range(n)] for i, n in enumerate((30, 1, 17, 40, 2))]
    requests = [
        ScoreRequest(token_ids=texts[0]),
        ScoreRequest(token_ids=texts[1], mtp=True),
        ScoreRequest(token_ids=texts[2], decode_from=1, mtp=True),
        ScoreRequest(token_ids=texts[3], decode_from=39),
        ScoreRequest(token_ids=texts[4], decode_from=1, mtp=True),
    ]
    beside = engine.generate([[9] * 20], GenerationParams(max_tokens=20, ignore_eos=True))
    rows = score_rows(engine, requests)
    for text, request, (logits, mtp_logits) in zip(texts, requests, rows, strict=True):
        parts = [text[: i + 1] for i in range(len(text))]
        assert logits == b"".join(logit_row(part, VOCAB, "main") for part in parts)
        want = [logit_row(part, VOCAB, "mtp") for part in parts[1:]] if request.mtp else []
        assert mtp_logits == b"".join(want)
    assert collect(beside, 1) == [
        expected([9] * 20, GenerationParams(max_tokens=20, ignore_eos=True))
    ]
    decoded = [s.request_id for p in executor.plans for s in p.decode if s.token_ids]
    assert sorted(set(decoded)) == [3, 4, 5]
    assert len(decoded) == 16 + 1 + 1
    assert_clean(engine)


@pytest.mark.parametrize(
    ("request_", "expected_text"),
    [
        (ScoreRequest(token_ids=[]), "the score request is empty"),
        (ScoreRequest(token_ids=[5, VOCAB]), r"token_ids\[1\]"),
        (ScoreRequest(token_ids=[5], decode_from=1), "2 tokens at least"),
        (ScoreRequest(token_ids=[5, 6], decode_from=2), "decode_from must be an integer in 1..1"),
        (ScoreRequest(token_ids=[5, 6], decode_from=0), "decode_from"),
        (ScoreRequest(token_ids=[5] * 257), "257 tokens, at most 256"),
    ],
)
def test_bad_score_requests(request_: ScoreRequest, expected_text: str) -> None:
    engine, _ = build()
    with pytest.raises(RequestError, match=expected_text):
        engine.score([ScoreRequest(token_ids=[5]), request_])
    assert not engine.scheduler.has_work


def test_a_failure_while_scoring_is_raised() -> None:
    engine, executor = build(max_batched_tokens=8)
    executor.fail_on = {1}
    with pytest.raises(WorkerFailure, match="rank 1 failed in prefill of step 1"):
        list(engine.score([ScoreRequest(token_ids=[5] * 20)]))
    rows = score_rows(engine, [ScoreRequest(token_ids=[5] * 20)])
    assert array("f", rows[0][0])[0] == array("f", logit_row([5], VOCAB, "main"))[0]
