"""The benchmarks' bookkeeping on rows made by hand: verdicts, page, picture, and that no op is missing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from benchmarks import kernels as command
from benchmarks.case import COPY_TBPS, Case, Timed
from benchmarks.report import (
    MARKS,
    Row,
    judge,
    own_rows,
    page,
    read_json,
    served_rows,
    verdict_table,
    verdicts,
    with_verdicts,
    write_json,
)
from benchmarks.targets import LINES, Figure, Goal, Line
from kernels import dispatch

CPU = torch.device("cpu")


def row(
    op: str,
    shape: str,
    us: float,
    *,
    tflops: float | None = None,
    tbps: float | None = None,
    library_us: float | None = None,
    implementation: str = "cuda",
) -> Row:
    return Row(
        op=op,
        shape=shape,
        implementation=implementation,
        us=us,
        tflops=tflops,
        tbps=tbps,
        share_of_limit=0.5,
        library=None if library_us is None else "somebody's",
        library_us=library_us,
        hardware="a GPU",
        date="2026-11-20",
    )


ROWS = [
    row("linear_quant", "wq_b M=4096 N=1 K=1", 100.0, tflops=900.0, tbps=0.5, library_us=80.0),
    row(
        "linear_quant",
        "wq_b M=4096 N=1 K=1",
        80.0,
        tflops=1125.0,
        tbps=0.6,
        library_us=80.0,
        implementation="deep_gemm",
    ),
    row("linear_quant", "wo_b M=1024 N=1 K=1", 50.0, tflops=800.0, tbps=0.5, library_us=55.0),
    row("linear_quant", "wq_b M=1 N=1 K=1", 12.0, tflops=5.0, tbps=COPY_TBPS / 2, library_us=9.0),
    row("rms_norm", "16384x4096", 100.0, tbps=0.8 * COPY_TBPS),
    row("hc_post", "16384x4x4096", 100.0, tbps=0.6 * COPY_TBPS, library_us=900.0),
    row("rms_norm", "8x4096", 3.0, tbps=0.01),
    row("topk_select", "8 x 262144, k 512", 50.0, tbps=0.1),
]


def line(start: str) -> Line:
    (found,) = [x for x in LINES if x.name.startswith(start)]
    return found


def test_every_op_has_a_case_or_a_reason() -> None:
    """Listing the cases needs no GPU, and each op of the table is measured or excused, not both."""
    measured = {case.op for case in command.all_cases()}
    ops = set(dispatch.table(CPU))
    assert measured <= ops, measured - ops
    assert set(command.NO_CASE) <= ops, set(command.NO_CASE) - ops
    assert not measured & set(command.NO_CASE)
    assert ops == measured | set(command.NO_CASE), ops - measured - set(command.NO_CASE)


def test_cases_are_distinct_and_counted() -> None:
    cases = list(command.all_cases())
    names = [(case.op, case.shape) for case in cases]
    assert len(names) == len(set(names))
    assert all(case.moved > 0 and math.isfinite(case.limit_us) for case in cases)
    some = list(command.all_cases(["rms_norm"]))
    assert {case.op for case in some} == {"rms_norm"}


@pytest.mark.parametrize("item", LINES, ids=lambda x: x.name)
def test_every_line_of_the_issue_judges_a_case(item: Line) -> None:
    judged = [case for case in command.all_cases() if item.judges(case.op, case.shape)]
    assert judged
    assert {case.op for case in judged} == set(item.rows)
    figures = {goal.figure for goals in (item.served, item.own, item.target) for goal in goals}
    assert all(case.flops for case in judged) or figures <= {Figure.SHARE, Figure.US}
    if Figure.LIBRARY in figures:
        assert all(case.library for case in judged)


def test_a_case_is_judged_once() -> None:
    for case in command.all_cases():
        assert sum(item.judges(case.op, case.shape) for item in LINES) <= 1, case.shape


def test_rates_and_times_are_judged_the_right_way_round() -> None:
    rate = judge((Goal(figure=Figure.TFLOPS, value=1000.0),), ROWS[0])
    time = judge((Goal(figure=Figure.US, value=40.0),), ROWS[7])
    assert rate is not None
    assert time is not None
    assert (rate.met, rate.ratio) == (False, 0.9)
    assert (time.met, time.ratio) == (False, 0.8)
    assert judge((Goal(figure=Figure.TFLOPS, value=1.0),), ROWS[4]) is None
    either = (Goal(figure=Figure.SHARE, value=0.9), Goal(figure=Figure.TFLOPS, value=800.0))
    best = judge(either, ROWS[0])
    assert best is not None
    assert best.met
    # Reading the weight takes 6 us: 6 + 6 us are allowed.
    few = row("linear_quant", f"x M=1 N=6000 K={int(COPY_TBPS * 1000)}", 12.0, tbps=1.0)
    allowed = judge((Goal(figure=Figure.US, value=6.0, plus_weight=True),), few)
    assert allowed is not None
    assert allowed.ratio == pytest.approx(1.0)


def test_served_takes_the_backend_and_own_does_not() -> None:
    item = line("fp8 block GEMM, M >= 1024")
    served = verdicts(item, item.served, served_rows(ROWS))
    own = verdicts(item, item.own, own_rows(ROWS))
    assert [(v.value, v.row.implementation) for v in served] == [(1.0, "deep_gemm"), (1.1, "cuda")]
    assert all(v.met for v in served)
    assert [(v.value, v.row.implementation) for v in own] == [(0.8, "cuda"), (1.1, "cuda")]
    without = [dataclasses.replace(r, library=None, library_us=None) for r in ROWS]
    assert verdicts(item, item.own, own_rows(without)) == []


def test_the_table_names_the_worst_row_and_how_far_it_is() -> None:
    text = verdict_table(ROWS)
    memory = next(x for x in text.splitlines() if x.startswith("| memory-bound"))
    assert "| 60 % of copy rate (hc_post 16384x4x4096) |" in memory
    assert "70 % of copy rate: **missed by 14 %**; 1 of 2 rows meet it" in memory
    assert "85 % of copy rate: 0 of 2 rows" in memory
    large = next(x for x in text.splitlines() if x.startswith("| fp8 block GEMM, M >= 1024"))
    assert "| 80 % of DeepGEMM (linear_quant wq_b M=4096 N=1 K=1) | 75 % of DeepGEMM: met" in large
    assert "100 % of DeepGEMM (linear_quant wq_b M=4096 N=1 K=1, by deep_gemm)" in large
    assert "100 % of DeepGEMM: 1 of 2 rows" in large
    index = next(x for x in text.splitlines() if x.startswith("| index score"))
    assert "not measured" in index
    assert len(text.splitlines()) == len(LINES) + 2


def test_the_table_replaces_what_is_between_the_marks() -> None:
    document = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    written = with_verdicts(document, ROWS)
    assert written == f"before\n{MARKS[0]}\n{verdict_table(ROWS)}\n{MARKS[1]}\nafter\n"
    assert with_verdicts(written, ROWS) == written
    with pytest.raises(ValueError, match="kernels"):
        with_verdicts("nothing", ROWS)


def test_rows_survive_their_file_and_reach_the_page(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_json(ROWS, path)
    assert read_json(path) == ROWS
    assert len(path.read_text().splitlines()) == len(ROWS) + 2
    text = page(ROWS, "the command")
    assert "a GPU, 2026-11-20; `the command`" in text
    assert sum(x.startswith(("| linear_quant", "| rms_norm")) for x in text.splitlines()) == 6


def test_the_picture_is_drawn_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import roofline

    assert roofline.points(ROWS)["linear_quant"][0] == (1800.0, 900.0)
    assert set(roofline.movers(ROWS)) == {"rms_norm", "hc_post", "topk_select"}
    path = tmp_path / "kernels.json"
    write_json(ROWS, path)
    monkeypatch.setattr("sys.argv", ["kernels", "--plot-only", "--json", str(path)])
    command.main()
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "Against the issue's table" in (tmp_path / "kernels.md").read_text()


def test_measure_makes_a_row_of_each_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"own": 10.0, "other": 20.0, "backend": 5.0}
    monkeypatch.setattr(
        command, "graph_us", lambda some: {name: times[calls[0]()] for name, calls in some.items()}
    )
    monkeypatch.setattr(command, "eager_us", lambda calls: times[calls[0]()] + 1)
    monkeypatch.setattr(command, "implementation", lambda op: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    timed = Timed(
        calls=[lambda: "own"],
        library=[lambda: "other"],
        backends={"deep_gemm": [lambda: "backend"]},
        library_in_graph=False,
    )
    case = Case(op="x", shape="1", make=lambda: timed, flops=79e8, moved=1e6, library="somebody's")
    own, served = command.measure(case)
    assert (own.us, own.implementation, own.library_us) == (10.0, "cuda", 21.0)
    assert (own.tflops, own.tbps, own.share_of_limit) == (790.0, 0.1, 1.0)
    assert (served.us, served.implementation) == (5.0, "deep_gemm")


def test_a_twin_is_timed_outside_of_graphs_and_a_failure_loses_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "graph_us", lambda some: dict.fromkeys(some, 1.0))
    monkeypatch.setattr(command, "eager_us", lambda calls: 7.0)
    monkeypatch.setattr(command, "implementation", lambda op: "reference")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def broken() -> Timed:
        raise RuntimeError("no such kernel")

    good = Case(op="x", shape="1", make=lambda: Timed(calls=[lambda: None]), moved=1e6)
    bad = dataclasses.replace(good, shape="2", make=broken)
    rows, failed = command.measure_all([bad, good])
    assert [(r.shape, r.implementation, r.us) for r in rows] == [("1", "reference", 7.0)]
    assert failed == [bad]
    assert "no such kernel" in capsys.readouterr().err


def test_the_committed_results_are_those_of_the_present_cases() -> None:
    """Every row of results/kernels.json belongs to a case; the pages show these rows."""
    rows = read_json(command.RESULTS / "kernels.json")
    known = {(case.op, case.shape) for case in command.all_cases()}
    assert {(r.op, r.shape) for r in rows} == known
    written = (command.RESULTS / "kernels.md").read_text(encoding="utf-8")
    assert written == page(rows, command.COMMAND)
    document = command.DOCUMENT.read_text(encoding="utf-8")
    assert document == with_verdicts(document, rows)
    assert (command.RESULTS / "roofline.png").is_file()
