"""The retrieval benchmark of the tiny model: facts far back in a prompt, asked for at its end.

A prompt is program text with facts ``set NAME = VALUE`` in it and ends with ``get NAME =``; the model
knows the value or it does not. One wrong row of a window, a cache or a selection shows here as it
would in a big model's benchmark. Works on token ids, so a prompt has exactly the length asked for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FACT_TOKENS = 5  # set NAME = VALUE newline
QUERY_TOKENS = 3  # get NAME =
MIN_DISTANCE = 5  # value, newline, get, NAME, = : a fact right before its query
DEFAULT_DISTANCES = (20, 60, 150, 300, 600, 1200, 1900)
DEFAULT_LENGTHS = (2048,)


class RetrievalError(ValueError):
    """A prompt that cannot be built, or a words file that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalWords:
    """Token ids of the task's words (``words.json`` beside the checkpoint)."""

    names: tuple[int, ...]
    values: tuple[int, ...]
    set_id: int
    get_id: int
    equals_id: int
    newline_id: int
    bos_id: int = 0

    @classmethod
    def from_file(cls, path: Path, *, bos_id: int = 0) -> RetrievalWords:
        """Read ``words.json``.

        Raises:
            RetrievalError: unreadable file, or a key that is missing or holds no token ids.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                names=tuple(map(int, raw["names"])),
                values=tuple(map(int, raw["values"])),
                set_id=int(raw["set"][0]),
                get_id=int(raw["get"][0]),
                equals_id=int(raw["eq"][0]),
                newline_id=int(raw["nl"][0]),
                bos_id=bos_id,
            )
        except (OSError, ValueError, TypeError, KeyError, IndexError) as err:
            raise RetrievalError(
                f"{path.name}: not a words file of the retrieval task: {err!r}"
            ) from err


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalPrompt:
    """One prompt; ``distance`` counts tokens from the fact's value to the answer's position."""

    token_ids: tuple[int, ...]
    answer: int
    length: int
    distance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalBuilder:
    """Makes prompts of any exact length and distance, the same ones for the same seed.

    Args:
        words: the task's token ids.
        filler: program text as token ids; used from a random offset, and again from its start.
        num_facts: facts in a prompt, the one asked for included (fewer where they do not fit).
        seed: of names, values and places.
    """

    words: RetrievalWords
    filler: Sequence[int]
    num_facts: int = 8
    seed: int = 0

    def build(self, length: int, distance: int, index: int) -> RetrievalPrompt:
        """Prompt number ``index`` of a length (tokens, BOS included) and a distance (tokens).

        Raises:
            RetrievalError: the fact does not fit between BOS and the query.
        """
        if not MIN_DISTANCE <= distance <= length - FACT_TOKENS + 1:
            raise RetrievalError(
                f"distance {distance} does not fit into a prompt of {length} tokens:"
                f" allowed {MIN_DISTANCE}..{length - FACT_TOKENS + 1}"
            )
        rng = random.Random(f"{self.seed} {length} {distance} {index}")
        before = length - distance - FACT_TOKENS + 1
        after = distance - MIN_DISTANCE
        # Decoys take part of the filler's room; a text shorter than a few facts holds none.
        decoys = min(self.num_facts - 1, (before + after) // (3 * FACT_TOKENS))
        names = rng.sample(self.words.names, decoys + 1)
        values = rng.sample(self.words.values, decoys + 1)
        facts = list(zip(names[1:], values[1:], strict=True))
        share = round(decoys * before / max(1, before + after))
        words = self.words
        ids = [words.bos_id]
        ids += self._text(rng, before, facts[:share])
        ids += self._fact(names[0], values[0])
        ids += self._text(rng, after, facts[share:])
        ids += [words.get_id, names[0], words.equals_id]
        return RetrievalPrompt(
            token_ids=tuple(ids), answer=values[0], length=length, distance=distance
        )

    def _fact(self, name: int, value: int) -> list[int]:
        words = self.words
        return [words.set_id, name, words.equals_id, value, words.newline_id]

    def _text(self, rng: random.Random, count: int, facts: list[tuple[int, int]]) -> list[int]:
        """``count`` tokens of program text, cut into lines, with the facts spread over it."""
        facts = facts[: count // FACT_TOKENS]
        plain = count - FACT_TOKENS * len(facts)
        cuts = sorted(rng.randint(0, plain) for _ in facts)
        offset = rng.randrange(len(self.filler))
        ids: list[int] = []
        for start, stop, fact in zip([0, *cuts], [*cuts, plain], [*facts, None], strict=True):
            piece = [self.filler[(offset + i) % len(self.filler)] for i in range(start, stop)]
            if piece:
                piece[-1] = self.words.newline_id
            ids += piece
            if fact is not None:
                ids += self._fact(*fact)
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalScore:
    """Right answers out of the prompts of one length and distance."""

    length: int
    distance: int
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.total


def program_text(root: Path) -> str:
    """The Python files below ``root`` (not hidden ones), one after another, as filler text."""
    files = sorted(
        p for part in ("cluster", "worker", "model", "kernels") for p in (root / part).rglob("*.py")
    )
    return "\n".join(p.read_text(encoding="utf-8") for p in files)


def grid(
    builder: RetrievalBuilder, lengths: Iterable[int], distances: Iterable[int], num: int
) -> Iterator[RetrievalPrompt]:
    """All prompts of the benchmark; pairs whose fact does not fit are left out."""
    distances = tuple(distances)
    for length in lengths:
        for distance in distances:
            if MIN_DISTANCE <= distance <= length - FACT_TOKENS + 1:
                for index in range(num):
                    yield builder.build(length, distance, index)


def evaluate(
    prompts: Sequence[RetrievalPrompt],
    answers: Callable[[Sequence[RetrievalPrompt]], Sequence[int]],
) -> list[RetrievalScore]:
    """Ask for every prompt's next token and count what is right, by length and distance.

    Args:
        prompts: from ``grid``.
        answers: gives the next token of each prompt, in order.
    """
    counts: dict[tuple[int, int], list[int]] = {}
    for prompt, answer in zip(prompts, answers(prompts), strict=True):
        cell = counts.setdefault((prompt.length, prompt.distance), [0, 0])
        cell[0] += answer == prompt.answer
        cell[1] += 1
    return [
        RetrievalScore(length=length, distance=distance, correct=correct, total=total)
        for (length, distance), (correct, total) in sorted(counts.items())
    ]
