"""Retrieval prompts: exact lengths and distances, one answer, the same prompts for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.retrieval import (
    MIN_DISTANCE,
    RetrievalBuilder,
    RetrievalError,
    RetrievalPrompt,
    RetrievalWords,
    evaluate,
    grid,
    program_text,
)
from cluster.retrieval_plot import plot_scores
from cluster.tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny-python"
WORDS = RetrievalWords.from_file(ASSETS / "words.json")
# Lines of two to eight tokens that are no words of the task.
FILLER = [t for n in range(400) for t in (*range(20, 21 + n % 7), WORDS.newline_id)]
BUILDER = RetrievalBuilder(WORDS, FILLER)


def facts(prompt: RetrievalPrompt) -> list[tuple[int, int, int]]:
    """(position of the value, name, value) of every fact."""
    ids = prompt.token_ids
    return [
        (i + 3, ids[i + 1], ids[i + 3])
        for i in range(len(ids) - 4)
        if ids[i] == WORDS.set_id and ids[i + 2] == WORDS.equals_id
    ]


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(min_value=9, max_value=700),
    distance=st.integers(min_value=MIN_DISTANCE, max_value=695),
    index=st.integers(min_value=0, max_value=9),
)
def test_length_distance_and_answer(length: int, distance: int, index: int) -> None:
    if distance > length - 4:
        with pytest.raises(RetrievalError, match=f"distance {distance}"):
            BUILDER.build(length, distance, index)
        return
    prompt = BUILDER.build(length, distance, index)
    ids = prompt.token_ids
    assert len(ids) == length == prompt.length
    assert ids[0] == WORDS.bos_id
    name = ids[-2]
    assert ids[-3:] == (WORDS.get_id, name, WORDS.equals_id)
    own = [(place, value) for place, known, value in facts(prompt) if known == name]
    assert own == [(length - distance, prompt.answer)]
    # Every fact is a line of its own, and no name or value is there twice.
    for place, _, _ in facts(prompt):
        assert ids[place + 1] == WORDS.newline_id
        assert ids[place - 4] in (WORDS.newline_id, WORDS.bos_id)
    assert len({known for _, known, _ in facts(prompt)}) == len(facts(prompt))
    assert len({value for _, _, value in facts(prompt)}) == len(facts(prompt))


def test_long_prompts_hold_other_facts_and_answered_queries() -> None:
    prompt = BUILDER.build(1024, 600, 0)
    assert len(facts(prompt)) == BUILDER.num_facts
    values = {name: value for _, name, value in facts(prompt)}
    ids = prompt.token_ids
    asked = [
        (ids[i + 1], ids[i + 3])
        for i in range(len(ids) - 4)
        if ids[i] == WORDS.get_id and ids[i + 2] == WORDS.equals_id
    ]
    assert len(asked) == BUILDER.num_shown
    assert all(values[name] == value for name, value in asked)


def test_same_seed_same_prompt() -> None:
    again = RetrievalBuilder(WORDS, FILLER)
    assert BUILDER.build(300, 100, 3) == again.build(300, 100, 3)
    other = RetrievalBuilder(WORDS, FILLER, seed=1)
    assert BUILDER.build(300, 100, 3) != other.build(300, 100, 3)


def test_words_are_single_tokens_of_the_shipped_tokenizer() -> None:
    tokenizer = Tokenizer.load(ASSETS)
    assert tokenizer is not None
    prompt = RetrievalBuilder(WORDS, tokenizer.encode(program_text())).build(400, 200, 0)
    text = tokenizer.decode(list(prompt.token_ids[1:]))
    name = tokenizer.decode([prompt.token_ids[-2]])
    assert text.endswith(f"\nget{name} =")
    assert f"\nset{name} ={tokenizer.decode([prompt.answer])}\n" in text


def test_grid_leaves_out_what_does_not_fit() -> None:
    prompts = list(grid(BUILDER, (64, 256), (20, 100), 2))
    assert [(p.length, p.distance) for p in prompts] == [
        (64, 20),
        (64, 20),
        (256, 20),
        (256, 20),
        (256, 100),
        (256, 100),
    ]


def test_evaluate_counts_by_length_and_distance(tmp_path: Path) -> None:
    prompts = list(grid(BUILDER, (256,), (20, 100), 4))

    def answers(asked: object) -> list[int]:
        assert asked == prompts
        return [p.answer if i % 4 else -1 for i, p in enumerate(prompts[:4])] + [-1] * 4

    scores = evaluate(prompts, answers)
    assert [(s.distance, s.correct, s.total, s.accuracy) for s in scores] == [
        (20, 3, 4, 0.75),
        (100, 0, 4, 0.0),
    ]
    plot_scores(scores, tmp_path / "plot.png", title="test")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "raw",
    [None, "{", [], {}, {"names": [1], "values": [2], "set": [], "get": [1], "eq": [1], "nl": [1]}],
    ids=str,
)
def test_bad_words_file(tmp_path: Path, raw: object) -> None:
    path = tmp_path / "words.json"
    if raw is not None:
        path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    with pytest.raises(RetrievalError, match=r"words\.json"):
        RetrievalWords.from_file(path)
