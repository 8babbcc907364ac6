"""Sequences: where an output ends, what is reported once, how prefixes are named."""

from __future__ import annotations

import pytest

from cluster.sequence import FinishReason, Request, Sequence
from worker.protocol import SamplingParams, TokenLogprobs


def make(prompt: list[int], **kwargs: object) -> Sequence:
    options: dict[str, object] = {"max_tokens": 5, "eos_token_ids": frozenset({1}), **kwargs}
    return Sequence(Request(request_id=0, prompt_ids=tuple(prompt), **options))  # type: ignore[arg-type]


def test_output_is_cut_at_the_first_stop_token() -> None:
    seq = make([7, 8])
    assert seq.append_tokens([3, 1, 4]) == 2
    assert (seq.output_ids, seq.finish_reason) == ([3, 1], FinishReason.STOP)


def test_output_is_cut_at_max_tokens() -> None:
    seq = make([7, 8], max_tokens=2)
    assert seq.append_tokens([3, 4, 5]) == 2
    assert (seq.output_ids, seq.finish_reason) == ([3, 4], FinishReason.LENGTH)


def test_stop_token_as_the_last_allowed_token_is_a_stop() -> None:
    seq = make([7], max_tokens=2)
    seq.append_tokens([3, 1])
    assert seq.finish_reason is FinishReason.STOP


def test_stop_tokens_before_min_tokens_do_not_end() -> None:
    seq = make([7], min_tokens=3)
    assert seq.append_tokens([1, 1, 1, 9]) == 3
    assert seq.finish_reason is FinishReason.STOP


def test_ignore_eos_keeps_the_users_stop_tokens() -> None:
    seq = make([7], ignore_eos=True, stop_token_ids=frozenset({4}))
    assert seq.append_tokens([1, 4, 5]) == 2
    assert seq.finish_reason is FinishReason.STOP


def test_a_stop_token_in_the_prompt_means_nothing() -> None:
    seq = make([1, 1])
    assert seq.append_tokens([3]) == 1
    assert seq.finish_reason is None


@pytest.mark.parametrize("again", [0, 2])
def test_prompt_logprobs_are_reported_once(again: int) -> None:
    """A preempted request computes its prompt again, in other chunks and with its output behind."""
    seq = make([5, 6, 7, 8], sampling=SamplingParams(prompt_logprobs=0))

    def rows(start: int, count: int) -> list[TokenLogprobs]:
        return [TokenLogprobs(token_id=start + 1 + i, logprob=0.0, rank=1) for i in range(count)]

    first = seq.take_prompt_logprobs(0, rows(0, 2))  # of tokens 1, 2
    second = seq.take_prompt_logprobs(again, rows(again, 5))  # and on, beyond the prompt
    assert [item.token_id for item in first + second] == [1, 2, 3]
    assert seq.take_prompt_logprobs(0, rows(0, 5)) == []


def test_chain_depends_on_all_tokens_before_and_on_the_salt() -> None:
    def key(tokens: list[int], position: int, salt: bytes = b"") -> bytes:
        return make(tokens, salt=salt).boundary_key(position, 4)

    base = list(range(12))
    assert key(base, 8) == key([*base[:8], 99], 8)
    assert key(base, 8) != key([99, *base[1:]], 8)
    assert key(base, 8) != key(base, 8, b"tenant")
    assert key(base, 8, b"a") != key(base, 8, b"b")
    assert key([0, 0, 0, 0, 1, 1, 1, 1], 8) != key([1, 1, 1, 1, 0, 0, 0, 0], 8)


def test_chain_grows_with_the_output() -> None:
    seq = make([1, 2, 3], max_tokens=9)
    seq.append_tokens([4, 5, 6, 7, 8])
    assert seq.boundary_key(8, 4) == make([1, 2, 3, 4, 5, 6, 7, 8]).boundary_key(8, 4)
    assert len(seq.chain) == 2
