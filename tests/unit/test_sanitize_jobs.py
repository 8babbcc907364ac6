"""Processes that run cases under a tool, with a script in the tool's place."""

from __future__ import annotations

import os
import sys

import pytest

from tests.sanitize_jobs import DONE, Worker, run_all

# Runs the cases of its lines: "good", "race" (the tool reports one), "elsewhere" (it
# launches no kernel of ours), "much" (with what was before, more than the tool keeps), "exit" (it ends).
SCRIPT = f"""
import sys
mark, found, seen = "=========", 0, []
print(mark, "COMPUTE-SANITIZER")
for line in sys.stdin:
    case = line.strip()
    if case.startswith("exit"):
        sys.exit(3)
    if case.startswith("much") and len(seen) > 0:
        print(mark, "Warning: Maximum number of hazards reached. Environment variable ...")
    seen.append(case)
    if case.startswith("race"):
        found += 1
        print(mark, "Error: Race reported between Write access at f()+0x10 in a.cuh:1")
        print(mark, "    and Read access at f()+0x20 in a.cuh:2 [4 hazards]")
    print("{DONE}", 0 if case.startswith("elsewhere") else 2, flush=True)
print(mark, f"RACECHECK SUMMARY: {{found + MORE}} hazards displayed")
"""


def start(more: int = 0) -> Worker:
    """A process; ``more``: reports of its summary that it did not print."""
    script = SCRIPT.replace("MORE", str(more))
    return Worker([sys.executable, "-c", script], dict(os.environ))


def test_every_case_runs_once_under_its_tool() -> None:
    names = {"racecheck": [["good"] * 2, ["good"] * 7], "memcheck": [["good"] * 4]}
    results = run_all(names, 3, lambda tool, job: start())
    assert results.passed == {"racecheck": 9, "memcheck": 4}
    assert not results.wrong


def test_a_finding_belongs_to_its_case_and_the_next_one_passes() -> None:
    results = run_all({"racecheck": [["good1"], ["race1", "good2"]]}, 1, lambda tool, job: start())
    assert results.passed == {"racecheck": 2}
    assert list(results.wrong) == [("racecheck", "race1")]
    assert "a.cuh:2" in results.wrong["racecheck", "race1"]


def test_a_process_that_ends_fails_its_case_and_another_takes_the_rest() -> None:
    started = []

    def again(tool: str, job: int) -> Worker:
        started.append((tool, job))
        return start()

    results = run_all({"racecheck": [["good1", "exit", "good2"]]}, 1, again)
    assert results.passed == {"racecheck": 2}
    assert "status 3" in results.wrong["racecheck", "exit"]
    assert started == [("racecheck", 0)] * 2


def test_a_process_whose_tool_keeps_no_more_findings_is_replaced() -> None:
    started = []

    def again(tool: str, job: int) -> Worker:
        started.append(tool)
        return start()

    results = run_all({"racecheck": [["good", "much", "good"]]}, 1, again)
    assert results.passed == {"racecheck": 3}
    assert not results.wrong
    assert len(started) == 2


def test_a_summary_that_names_more_reports_is_wrong() -> None:
    results = run_all({"racecheck": [["good1", "good2"]]}, 1, lambda tool, job: start(more=1))
    assert results.passed == {"racecheck": 2}
    (wrong,) = results.wrong.values()
    assert "summary" in wrong


def test_a_case_that_launches_nothing_of_ours_is_wrong() -> None:
    results = run_all({"memcheck": [["good", "elsewhere"]]}, 1, lambda tool, job: start())
    assert results.passed == {"memcheck": 1}
    assert "CUDA C++" in results.wrong["memcheck", "elsewhere"]


def test_what_starts_no_process_is_an_error() -> None:
    def nothing(tool: str, job: int) -> Worker:
        raise OSError("no such tool")

    with pytest.raises(OSError, match="no such tool"):
        run_all({"racecheck": [["good"]]}, 2, nothing)
