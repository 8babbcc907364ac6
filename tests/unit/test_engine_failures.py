"""The engine on mock ranks: ranks that are lost, and scoring."""

from __future__ import annotations

from array import array

import pytest

from cluster.engine import LLMEngine
from cluster.errors import EngineDead, RequestError, WorkerFailure
from cluster.events import RequestEvent, ScoreRequest
from cluster.params import GenerationParams
from cluster.sequence import FinishReason
from tests.helpers.engine_bench import (
    VOCAB,
    assert_clean,
    build,
    collect,
    expected,
)
from tests.helpers.mock_executor import logit_row

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
