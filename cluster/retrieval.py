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

LINE_TOKENS = 5  # set NAME = VALUE newline; a query that is answered is as long
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


class RetrievalBuilder:
    """Makes prompts of any exact length and distance, the same ones for the same seed.

    The tiny model learned facts between whole lines of text, so the text is cut only where a line at
    the left margin begins; a blank line makes up for tokens that no cut has.

    Args:
        words: the task's token ids.
        filler: program text as token ids; used from any such line on, and again from its start.
        num_facts: facts in a prompt, the one asked for included (fewer where they do not fit).
        num_shown: of the other facts, how many are asked for and answered further on in the text.
        seed: of names, values and places.
    """

    def __init__(
        self,
        words: RetrievalWords,
        filler: Sequence[int],
        *,
        num_facts: int = 48,
        num_shown: int = 23,
        seed: int = 0,
    ) -> None:
        newline = words.newline_id
        self.words = words
        self.num_facts, self.num_shown, self.seed = num_facts, num_shown, seed
        self._filler = [*filler, newline]
        self._starts = [0, *(i + 1 for i, token in enumerate(filler) if token == newline)]
        self._is_start = frozenset(self._starts)

    def build(self, length: int, distance: int, index: int) -> RetrievalPrompt:
        """Prompt number ``index`` of a length (tokens, BOS included) and a distance (tokens).

        Raises:
            RetrievalError: the fact does not fit between BOS and the query.
        """
        if not MIN_DISTANCE <= distance <= length - LINE_TOKENS + 1:
            raise RetrievalError(
                f"distance {distance} does not fit into a prompt of {length} tokens:"
                f" allowed {MIN_DISTANCE}..{length - LINE_TOKENS + 1}"
            )
        rng = random.Random(f"{self.seed} {length} {distance} {index}")
        before = length - distance - LINE_TOKENS + 1
        after = distance - MIN_DISTANCE
        # Other lines take part of the text's room; a text of a few lines holds none.
        room = before + after
        others = min(self.num_facts - 1, room // (4 * LINE_TOKENS))
        names = rng.sample(self.words.names, others + 1)
        values = rng.sample(self.words.values, others + 1)
        words = self.words
        lines = [
            [words.set_id, name, words.equals_id, value, words.newline_id]
            for name, value in zip(names, values, strict=True)
        ]
        asked = [[words.get_id, *line[1:]] for line in lines[1 : 1 + min(self.num_shown, others)]]
        inserted = [*lines[1:], *asked]
        share = round(len(inserted) * before / max(1, room))
        ids = [words.bos_id]
        ids += self._text(rng, before, inserted[:share])
        ids += lines[0]
        ids += self._text(rng, after, inserted[share:])
        ids += [words.get_id, names[0], words.equals_id]
        return RetrievalPrompt(
            token_ids=tuple(ids), answer=values[0], length=length, distance=distance
        )

    def _text(self, rng: random.Random, count: int, inserted: list[list[int]]) -> list[int]:
        """``count`` tokens: whole lines of program text, with other lines between them."""
        inserted = inserted[: count // (2 * LINE_TOKENS)]
        plain = self._whole_lines(rng, count - LINE_TOKENS * len(inserted))
        places = [i + 1 for i, token in enumerate(plain) if token == self.words.newline_id] or [0]
        cuts = sorted(rng.choices(places, k=len(inserted)))
        ids: list[int] = []
        for start, stop, line in zip([0, *cuts], [*cuts, len(plain)], [*inserted, []], strict=True):
            ids += plain[start:stop]
            ids += line
        return ids

    def _whole_lines(self, rng: random.Random, count: int) -> list[int]:
        """``count`` tokens of text that begins and ends where a line does."""
        size = len(self._filler)
        for length in range(count, 0, -1):
            fitting = [s for s in self._starts if (s + length) % size in self._is_start]
            if fitting:
                first = rng.choice(fitting)
                text = [self._filler[(first + i) % size] for i in range(length)]
                return text + [self.words.newline_id] * (count - length)
        return [self.words.newline_id] * count


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


def program_text() -> str:
    """Python source that ships with the tiny model: the same text whatever becomes of our own code."""
    root = Path(__file__).resolve().parent.parent
    return (root / "assets" / "tiny-python" / "filler.txt").read_text(encoding="utf-8")


def grid(
    builder: RetrievalBuilder, lengths: Iterable[int], distances: Iterable[int], num: int
) -> Iterator[RetrievalPrompt]:
    """All prompts of the benchmark; pairs whose fact does not fit are left out."""
    distances = tuple(distances)
    for length in lengths:
        for distance in distances:
            if MIN_DISTANCE <= distance <= length - LINE_TOKENS + 1:
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


def total(rounds: Sequence[Sequence[RetrievalScore]]) -> list[RetrievalScore]:
    """The scores of several rounds over the same prompts, added up."""
    return [
        RetrievalScore(
            length=cells[0].length,
            distance=cells[0].distance,
            correct=sum(cell.correct for cell in cells),
            total=sum(cell.total for cell in cells),
        )
        for cells in zip(*rounds, strict=True)
    ]
