"""A small set of combinations in which every pair of choices occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TRIES = 100

Row = dict[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]], canonical: Callable[[Row], Row] = dict, seed: int = 0
) -> list[Row]:
    """Greedy covering array: any two choices of two different factors meet in some row.

    The same rows for the same arguments; about as many as the two longest factors' product.

    Args:
        factors: name -> choices.
        canonical: maps a row to the one that stands for it (a choice may mean nothing beside
            another); pairs that no canonical row has are not asked for.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    rng = random.Random(seed)
    missing = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    ]
    rows: list[Row] = []
    while missing:
        best: Row = {}
        covered: set[Any] = set()
        for _ in range(_TRIES):
            row = {name: rng.choice(factors[name]) for name in names}
            row = canonical({**row, **dict(missing[0])})
            won = {pair for pair in missing if all(row[name] == value for name, value in pair)}
            if len(won) > len(covered):
                best, covered = row, won
        if covered:
            rows.append({name: best[name] for name in factors})
        else:
            covered = {missing[0]}  # no canonical row has it
        missing = [pair for pair in missing if pair not in covered]
    return rows
