"""Processes under a tool of compute-sanitizer, which run cases by name, one after the other."""

from __future__ import annotations

import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from tests.sanitize_known import Known, Reports

DONE = "ran the case"  # what a process says behind each one, and its number of launches
FULL = "Maximum number of hazards reached"  # by all cases of a process: racecheck then drops some
END = "and those before it in its process"


class Worker:
    """A process that runs the case of each line it reads, and then says ``DONE`` and a number.

    Attributes:
        reports: what the tool has found.
        alive: it can run another case.
        cases: that it has run.
        full: the tool keeps no more findings.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.reports = Reports()
        self.alive, self.full, self.cases = True, False, 0
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def run(self, name: str) -> str:
        """Run a case; what is wrong, or nothing."""
        self.cases += 1
        seen = len(self.reports.new)
        with suppress(BrokenPipeError):  # it has ended: so do its lines
            self._say(f"{name}\n")
        self.alive = self._read()
        wrong = self.reports.new[seen:]
        self.full = any(FULL in text for text in wrong)
        if not self.alive:
            wrong.append(f"the process has ended with status {self._process.wait()}")
        return "\n".join(wrong)

    def end(self) -> str:
        """Let it end; what is wrong, or nothing."""
        seen = len(self.reports.new)
        assert self._process.stdin
        self._process.stdin.close()
        self._read()
        wrong = self.reports.new[seen:]
        if status := self._process.wait():
            wrong.append(f"exit status {status}")
        if not (self.reports.complete or self.reports.new):
            wrong.append("the tool's summary is missing or names more reports")
        return "\n".join(wrong)

    def _say(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _read(self) -> bool:
        """Read up to ``DONE``; False: there is nothing more."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(DONE):
                if line.split()[-1] == "0":
                    self.reports.new.append("no kernel of CUDA C++ was launched")
                return True
            if self.reports.read(line):
                print(line, end="", flush=True)
        return False


@dataclass(slots=True)
class Results:
    """What ``run_all`` met.

    Attributes:
        passed: number of cases of each tool in which nothing was found.
        known: how often a tool reported what is known.
        wrong: by tool and case.
    """

    passed: Counter[str] = field(default_factory=Counter)
    known: Counter[tuple[str, Known]] = field(default_factory=Counter)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)

    def close(self, tool: str, worker: Worker, name: str) -> None:
        """Let a process end, if it has not, whose last case was ``name``; keep what it found."""
        if worker.alive and (wrong := worker.end()):
            self.wrong[tool, f"{name} {END}"] = wrong
        for entry, count in worker.reports.known.items():
            self.known[tool, entry] += count


def run_all(
    names: Mapping[str, Sequence[Sequence[str]]], jobs: int, start: Callable[[str, int], Worker]
) -> Results:
    """Run every case under its tools.

    Args:
        names: of the cases of each tool, in groups that one process runs.
        jobs: how many processes work side by side.
        start: makes a process for a tool and the number of a job.
    """
    results = Results()
    left = {tool: deque(map(deque, groups)) for tool, groups in names.items()}
    all_groups = [group for groups in left.values() for group in groups]
    tools = list(left)

    def work(job: int) -> None:
        turn = job % len(tools)
        for tool in (*tools[turn:], *tools[:turn]):
            _run_tool(tool, left[tool], lambda tool=tool: start(tool, job), results)

    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(work, job) for job in range(jobs)]
        try:
            for job in started:
                job.result()
        finally:
            for group in all_groups:  # where one was interrupted: no other goes on
                group.clear()
    return results


def _run_tool(
    tool: str, groups: deque[deque[str]], start: Callable[[], Worker], results: Results
) -> None:
    """Take groups until there are none; a new process where one has ended."""
    worker: Worker | None = None
    for name in _taken(groups):
        began = time.time()
        worker = worker or start()
        wrong = worker.run(name)
        if worker.full and worker.cases > 1:  # again, in a process without findings
            results.close(tool, worker, name)
            worker = start()
            wrong = worker.run(name)
        verdict = f": WRONG\n{wrong}" if wrong else ""
        print(f"{tool} {name} {time.time() - began:.1f} s{verdict}", flush=True)
        if wrong:
            results.wrong[tool, name] = wrong
        else:
            results.passed[tool] += 1
        if not worker.alive or worker.full:
            results.close(tool, worker, name)
            worker = None
    if worker:
        results.close(tool, worker, name)


def _taken(groups: deque[deque[str]]) -> Iterator[str]:
    while groups:
        try:
            group = groups.popleft()
        except IndexError:
            return  # another job was faster
        while group:
            yield group.popleft()
