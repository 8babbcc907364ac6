"""Who tells what racecheck is known to report from what is new, on output of the tool (13.0)."""

from __future__ import annotations

import pytest

from tests.sanitize_known import KNOWN, Known, Line, Reports, _sources

ENTRIES = [pytest.param(entry, id=str(i)) for i, entry in enumerate(KNOWN)]
BLANK = "========= \n"


def number(line: Line) -> int:
    """Of the line in its source, from 1."""
    for lines in _sources(line.file):
        for i, text in enumerate(lines, 1):
            if line.text in text:
                return i
    raise LookupError(line)


def output(first: Line, second: Line, shift: int = 0) -> list[str]:
    """What the tool prints of a pair; ``shift`` is added to the second line's number."""
    kernel = "void causeway::some_kernel<(bool)0>(causeway::Arguments, CUtensorMap_st)"
    part = (
        "void causeway::part<(int)160>(const causeway::Table<T1> &, int)::[lambda(int, int)"
        " (instance 1)]::operator ()(int, int) const"
    )
    return [
        f"========= Error: Race reported between Write access at {kernel}+0x3cc0 in"
        f" {first.file}:{number(first)}\n",
        f"=========     and Read access at {part}+0x4360 in"
        f" {second.file}:{number(second) + shift} [540 hazards]\n",
        BLANK,
    ]


def summary(count: int) -> str:
    return f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"


def read(lines: list[str]) -> tuple[Reports, list[str]]:
    """The reports, and the lines that people see."""
    reports = Reports()
    return reports, [line for line in lines if reports.read(line)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_known_pair_is_known_in_either_order(entry: Known) -> None:
    assert len(entry.why.split()) > 8
    for other in entry.others:
        for pair in ((entry.one, other), (other, entry.one)):
            lines = ["========= COMPUTE-SANITIZER\n", "ran a case\n", *output(*pair), summary(1)]
            reports, seen = read(lines)
            assert reports.known == {entry: 1}
            assert not reports.new
            assert reports.complete
            assert seen == ["ran a case\n", summary(1)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_line_is_new(entry: Known) -> None:
    """One access in the list does not make the pair known."""
    lines = output(entry.one, entry.others[0], shift=-1)
    reports, seen = read([*lines, summary(1)])
    assert not reports.known
    assert reports.new == ["".join(lines[:2]).rstrip()]
    assert lines[1] in seen


def test_an_inlined_line_is_known_in_the_files_that_call_it() -> None:
    """The tool names at times the caller's file with the number of the line that is inlined."""
    inlined = next(entry for entry in KNOWN if entry.one.callers)
    lines = output(inlined.one, inlined.others[0])
    for file, known in ((inlined.one.callers[0], True), ("another.cuh", False)):
        moved = lines[0].replace(inlined.one.file, file)
        reports, _ = read([moved, *lines[1:], summary(1)])
        assert bool(reports.known) is known
        assert bool(reports.new) is not known


def test_all_lines_of_a_statement_are_the_line() -> None:
    entry = KNOWN[0]
    for shift, known in ((0, 1), (1, 1), (2, 1), (3, 0)):
        reports, _ = read([*output(entry.one, entry.others[0], shift), summary(1)])
        assert reports.known[entry] == known
        assert len(reports.new) == 1 - known


def test_the_second_of_two_accesses_may_be_the_new_one() -> None:
    entry = KNOWN[0]
    known, new = output(entry.one, entry.others[0]), output(entry.one, entry.others[0], shift=-1)
    reports, _ = read([known[0], known[1], new[1], BLANK, summary(1)])
    assert reports.known == {entry: 1}
    assert len(reports.new) == 1


@pytest.mark.parametrize(
    "line",
    [
        "========= Error: Race reported between Write access at causeway::f(int)+0x10",  # no line
        "========= Invalid __global__ read of size 16 bytes",
        "========= Error: No attachable process found. compute-sanitizer timed-out.",
        "=========     and Read access at causeway::f(int)+0x10 in f.cu:7 [3 hazards]",  # no first
    ],
)
def test_what_is_not_understood_is_new(line: str) -> None:
    reports, seen = read([f"{line}\n", summary(0)])
    assert reports.new == [line]
    assert seen == [f"{line}\n", summary(0)]


@pytest.mark.parametrize(
    ("end", "complete"),
    [
        ([summary(1)], True),
        ([], False),  # the tool was cut off
        ([summary(2)], False),  # a report that was not read
    ],
)
def test_an_end_with_all_reports_is_asked_for(end: list[str], complete: bool) -> None:
    reports, _ = read([*output(KNOWN[0].one, KNOWN[0].others[0]), *end])
    assert reports.complete is complete


@pytest.mark.parametrize(("count", "complete"), [(0, True), (2, False)])
def test_the_summary_of_memcheck(count: int, complete: bool) -> None:
    reports, _ = read([f"========= ERROR SUMMARY: {count} errors\n"])
    assert reports.complete is complete
