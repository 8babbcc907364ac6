"""The engine on mock ranks: text and where it stops, and requests that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import RequestError
from cluster.events import RequestEvent
from cluster.params import GenerationParams
from cluster.sequence import FinishReason
from tests.helpers.byte_tokenizer import FIRST_BYTE, VOCAB_SIZE
from tests.helpers.engine_bench import (
    TOKENIZER,
    assert_clean,
    build,
)
from tests.helpers.mock_executor import MockExecutor

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
