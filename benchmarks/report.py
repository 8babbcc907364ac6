"""Rows of results: their file, the Markdown page, and how they stand against the issue's table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.targets import LINES, Figure, Goal, Goals, Line, figure_of, limit_us

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
        wanted = goal.value + (limit_us(data) if goal.plus_limit else 0.0)
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


def worst(line: Line, goals: Goals, rows: Sequence[Row]) -> Verdict | None:
    """The row of a line that stands worst."""
    judged = [judge(goals, row) for row in rows if line.judges(row.op, row.shape)]
    return min((v for v in judged if v is not None), key=lambda v: v.ratio, default=None)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """One row a line: differences between runs are readable."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_json(path: Path) -> list[Row]:
    """Rows that ``write_json`` wrote."""
    return [Row(**item) for item in json.loads(path.read_text(encoding="utf-8"))]


def verdict_table(rows: Sequence[Row]) -> str:
    """One line per line of the issue's table: the row that stands worst, served and own."""
    out = [
        "| line | rows | served, worst row | must | own kernel, worst row | must | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in LINES:
        served, own = served_rows(rows), own_rows(rows)
        count = sum(line.judges(row.op, row.shape) for row in own)
        if not count:
            out.append(f"| {line.name} | 0 | not measured | | not measured | | |")
            continue
        cells = [line.name, str(count)]
        for goals, chosen in ((line.served, served), (line.own, own)):
            verdict = worst(line, goals, chosen)
            cells += _cells(goals, verdict)
        reached = [judge(line.target, row) for row in own if line.judges(row.op, row.shape)]
        known = [v for v in reached if v is not None]
        met = f"{_goal_text(line.target)}: {sum(v.met for v in known)} of {len(known)} rows"
        out.append(f"| {' | '.join(cells)} | {met if line.target else ''} |")
    return "\n".join(out)


def _cells(goals: Goals, verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["library not installed", _goal_text(goals)]
    by = "" if verdict.row.implementation not in OPTIONAL else f", by {verdict.row.implementation}"
    label = f"{verdict.row.op} {verdict.row.shape}".replace("|", "/")
    return [f"{_value_text(verdict)} ({label}{by})", f"{_goal_text(goals)}: {_met_text(verdict)}"]


def _met_text(verdict: Verdict) -> str:
    if verdict.met:
        return "met"
    return f"**missed by {100 * (1 - verdict.ratio):.0f} %**"


def _value_text(verdict: Verdict) -> str:
    return _number(verdict.goal.figure, verdict.value)


def _goal_text(goals: Goals) -> str:
    return " or ".join(
        _number(g.figure, g.value) + (" + bytes / 4.27 TB/s" if g.plus_limit else "") for g in goals
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

"Served" is what runs where the optional packages are installed; the worst row of each line is shown.

{verdict_table(rows)}

## All rows

{row_table(rows)}
"""
