"""Accuracy over distance as a PNG; matplotlib is an optional package (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.retrieval import RetrievalScore


def plot_scores(scores: Sequence[RetrievalScore], path: Path, *, title: str) -> None:
    """Draw one line per prompt length, accuracy (%) over distance (tokens, log scale).

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for length in sorted({s.length for s in scores}):
        line = [s for s in scores if s.length == length]
        axes.plot(
            [s.distance for s in line],
            [100 * s.accuracy for s in line],
            marker="o",
            label=f"{length} tokens",
        )
    axes.set_xscale("log")
    axes.set_ylim(-5, 105)
    axes.set_xlabel("distance from fact to answer (tokens)")
    axes.set_ylabel("right answers (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
