"""Rows of results: their file, the Markdown page, and how they stand against the issue's table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.targets import LINES, Figure, Goal, Goals, Line, figure_of, weight_us

MARKS = ("<!-- kernels: written by benchmarks/kernels.py -->", "<!-- end of kernels -->")
OPTIONAL = ("deep_gemm", "flash_mla")  # implementations that need an optional package


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure, as results/kernels.json keeps it.

    Args:
        op: name in the dispatch table.
        shape: sizes in words.
        implementation: whose time ``us`` is: the own one's, or an optional backend's through the op.
        us: median microseconds of one call.
        tflops: None where no operations are counted.
        tbps: bytes that have to move, over ``us``.
        share_of_limit: time that operations or bytes alone would take, over ``us``.
        library: whose kernel ``library_us`` is.
        library_us: its time in the same run, on the same inputs.
        hardware: the device's name.
        date: day of the run.
    """

    op: str
    shape: str
    implementation: str
    us: float
    tflops: float | None
    tbps: float | None
    share_of_limit: float
    library: str | None
    library_us: float | None
    hardware: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How one row stands against a goal: ``ratio`` >= 1 is met."""

    row: Row
    goal: Goal
    value: float
    ratio: float

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio >= 1.0


def judge(goals: Goals, row: Row) -> Verdict | None:
    """The goal that the row comes closest to (any one is enough); None where nothing was measured."""
    found = []
    data = asdict(row)
    for goal in goals:
        value = figure_of(goal.figure, data)
        if value is None:
            continue
        wanted = goal.value + (weight_us(row.shape) if goal.plus_weight else 0.0)
        ratio = wanted / value if goal.figure.less_is_better else value / wanted
        found.append(Verdict(row=row, goal=goal, value=value, ratio=ratio))
    return max(found, key=lambda v: v.ratio, default=None)


def own_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of this project's kernels."""
    return [row for row in rows if row.implementation not in OPTIONAL]


def served_rows(rows: Sequence[Row]) -> list[Row]:
    """What serves each op and shape where the optional packages are installed: the backend's row if any."""
    best = {(row.op, row.shape): row for row in own_rows(rows)}
    best |= {(row.op, row.shape): row for row in rows if row.implementation in OPTIONAL}
    return list(best.values())


def verdicts(line: Line, goals: Goals, rows: Sequence[Row]) -> list[Verdict]:
    """How the rows of a line stand, the worst first; rows without the figure are left out."""
    judged = [judge(goals, row) for row in rows if line.judges(row.op, row.shape)]
    return sorted((v for v in judged if v is not None), key=lambda v: v.ratio)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """One row a line: differences between runs are readable."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_json(path: Path) -> list[Row]:
    """Rows that ``write_json`` wrote."""
    return [Row(**item) for item in json.loads(path.read_text(encoding="utf-8"))]


def verdict_table(rows: Sequence[Row]) -> str:
    """One line per line of the issue's table: the row that stands worst, own and served."""
    out = [
        "| line | own kernel, worst row | must | target | served, worst row | must |",
        "|---|---|---|---|---|---|",
    ]
    for line in LINES:
        own = verdicts(line, line.own, own_rows(rows))
        running = served_rows(rows) if line.backends_serve else own_rows(rows)
        served = verdicts(line, line.served, running)
        reached = verdicts(line, line.target, own_rows(rows))
        cells = (
            line.name,
            _worst_text(own),
            _must_text(line.own, own),
            f"{_goal_text(line.target)}: {_count_text(reached)}" if line.target else "",
            _worst_text(served),
            _must_text(line.served, served),
        )
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def _worst_text(judged: Sequence[Verdict]) -> str:
    if not judged:
        return "not measured"
    row = judged[0].row
    by = f", by {row.implementation}" if row.implementation in OPTIONAL else ""
    label = f"{row.op} {row.shape}".replace("|", "/")
    return f"{_number(judged[0].goal.figure, judged[0].value)} ({label}{by})"


def _must_text(goals: Goals, judged: Sequence[Verdict]) -> str:
    if not judged:
        return _goal_text(goals)
    count = "" if judged[0].met else f"; {_count_text(judged)} meet it"
    return f"{_goal_text(goals)}: {_met_text(judged[0])}{count}"


def _count_text(judged: Sequence[Verdict]) -> str:
    return f"{sum(v.met for v in judged)} of {len(judged)} rows"


def _met_text(verdict: Verdict) -> str:
    if verdict.met:
        return "met"
    return f"**missed by {100 * (1 - verdict.ratio):.0f} %**"


def _goal_text(goals: Goals) -> str:
    return " or ".join(
        _number(g.figure, g.value) + (" + weight bytes / 4.27 TB/s" if g.plus_weight else "")
        for g in goals
    )


def _number(figure: Figure, value: float) -> str:
    if figure in (Figure.SHARE, Figure.LIBRARY):
        return f"{100 * value:.0f} % {figure.value}"
    return f"{value:.4g} {figure.value}"


def row_table(rows: Sequence[Row]) -> str:
    """Every row, with the goal it is judged by."""
    out = [
        "| op | shape | by | us | TF/s | TB/s | of limit | library | us | must (own) | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal, state = "", ""
        line = next((x for x in LINES if x.judges(row.op, row.shape)), None)
        if line is not None:
            goals = line.served if row.implementation in OPTIONAL else line.own
            verdict = judge(goals, row)
            goal = _goal_text(goals)
            state = "" if verdict is None else _met_text(verdict)
        cells = (
            row.op,
            row.shape.replace("|", "/"),
            row.implementation,
            f"{row.us:.2f}",
            "" if row.tflops is None else f"{row.tflops:.0f}",
            "" if row.tbps is None else f"{row.tbps:.2f}",
            f"{100 * row.share_of_limit:.0f} %",
            (row.library or "") if row.library_us is not None else "",
            "" if row.library_us is None else f"{row.library_us:.2f}",
            goal,
            state,
        )
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def page(rows: Sequence[Row], command: str) -> str:
    """The Markdown page of a run."""
    hardware = ", ".join(sorted({row.hardware for row in rows}))
    dates = ", ".join(sorted({row.date for row in rows}))
    return f"""# Kernels: last results

{hardware}, {dates}; `{command}`. Random data, medians inside a CUDA graph; library kernels on the same
inputs in the same run. Limits: bf16 790 TF/s, fp8 1580 TF/s, copies 4.27 TB/s. `by`: the own kernel (cuda,
triton; reference is the torch twin) or an optional backend through the op, its conversions included.

![Roofline](roofline.png)

## Against the issue's table

The worst row of each line is shown. "Served" is what runs where the optional packages are installed.

{verdict_table(rows)}

## All rows

{row_table(rows)}
"""


def with_verdicts(document: str, rows: Sequence[Row]) -> str:
    """A Markdown document with the table of verdicts between its two marks.

    Raises:
        ValueError: the marks are missing.
    """
    before, mark, rest = document.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"no {MARKS[0]} ... {MARKS[1]} in the document")
    return f"{before}{mark}\n{verdict_table(rows)}\n{end}{after}"
