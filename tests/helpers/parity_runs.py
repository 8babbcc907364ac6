"""One program on every mesh and the same requests one by one on one rank, each run once per session.

The tests of tests/distributed look at different sides of these runs: logits, caches, owners of pages.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.helpers.model_setup import Setup, stream, write_shape
from tests.helpers.ranks import run_ranks
from tests.helpers.step_driver import Driver, Part, Request, Row, rows_of

LONGEST = 648

# Requests of one step: fewer tokens than ranks, than a window, around multiples of 128, and every
# residue of the mesh sizes 2 and 4.
TOGETHER = ((1, 2, 3, 5, 127, 128, 129, 383), (255, 257, 384, 514))
# Chunk ends of two requests that share their steps: starts mod 128 are 0, 1, 2, 3, 126 and 127.
CHUNKS = (
    (1, 3, 126, 127, 128, 130, 254, 383, 384, 515, 640),
    (2, 129, 131, 255, 256, 259, 382, 390, 512, 513, 641),
)
DECODED = 7  # forced tokens after the chunks: both requests cross a group of four


@dataclass(slots=True)
class Outcome:
    """What one rank saw: logits by (stream, first row), cache contents by (stream, length)."""

    logits: list[tuple[int, int, Tensor]] = field(default_factory=list)
    mtp_logits: list[tuple[int, int, Tensor]] = field(default_factory=list)
    contents: dict[tuple[int, int], list[dict[str, Tensor]]] = field(default_factory=dict)
    # per layer: the local main pages that were written, and those the requests' owned blocks fill
    touched: list[tuple[list[int], list[int]]] = field(default_factory=list)


def program(driver: Driver) -> Outcome:
    """Several requests per step, chunks that end anywhere, forced decode rows."""
    out = Outcome()
    for number, lengths in enumerate(TOGETHER):
        driver.reset()
        requests = [driver.open(stream(i, n), slot=7 - i) for i, n in enumerate(lengths)]
        parts = [Part(request=r, count=len(r.tokens), mtp_logits=number == 0) for r in requests]
        for i, answer in enumerate(driver.prefill(*parts)):
            out.logits.append((i, 0, rows_of(answer.logits)))
            if number == 0:
                out.mtp_logits.append((i, 0, rows_of(answer.mtp_logits)))
        keep(driver, out, enumerate(requests))
        out.touched += touched_pages(driver, requests)
    driver.reset()
    requests = [driver.open(stream(i, LONGEST), slot=2 + i) for i in range(2)]
    for ends in zip(*CHUNKS, strict=True):
        parts = [
            Part(request=r, count=end - r.computed, mtp_logits=True)
            for r, end in zip(requests, ends, strict=True)
        ]
        starts = [r.computed for r in requests]
        for i, answer in enumerate(driver.prefill(*parts)):
            out.logits.append((i, starts[i], rows_of(answer.logits)))
            out.mtp_logits.append((i, starts[i], rows_of(answer.mtp_logits)))
    for _ in range(DECODED):
        starts = [r.computed for r in requests]
        rows = [Row(request=r, forced=1, logits=True, mtp_logits=True) for r in requests]
        for i, answer in enumerate(driver.decode(*rows)):
            out.logits.append((i, starts[i], rows_of(answer.logits)))
            out.mtp_logits.append((i, starts[i], rows_of(answer.mtp_logits)))
    keep(driver, out, enumerate(requests))
    out.touched += touched_pages(driver, requests)
    return out


def keep(driver: Driver, out: Outcome, requests: Any) -> None:
    """Remember the cache contents of requests given as (stream, request)."""
    for number, request in requests:
        out.contents[number, request.computed] = driver.contents(request)


def touched_pages(driver: Driver, requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
    """Per compressed layer: local main pages that are no longer poison, and those that should not be."""
    found = []
    for layer in driver.pool.layers:
        if not layer.ratio:
            continue
        written = (layer.main != 0xFF).any(1).nonzero().flatten().tolist()
        used = [
            block
            for r in requests
            for i, block in enumerate(r.blocks)
            if r.computed // layer.ratio > i * (driver.setup.block_size // layer.ratio)
        ]
        if driver.setup.shard == "cp":
            cp, rank = driver.setup.cp, driver.mesh.coord.cp_rank
            used = [b // cp for b in used if b % cp == rank]
        found.append((written, sorted(used)))
    return found


def run_setups(rank: int, world: int, setups: Sequence[Setup]) -> dict[str, Outcome]:
    """The program under each setup, on one rank of a process group."""
    results = {}
    for setup in setups:
        driver = Driver(setup, rank)
        results[setup.name] = program(driver)
        driver.close()
    return results


@functools.cache
def shape_path(**changes: int | tuple[int, ...]) -> str:
    """A config.json of the test shape, alive as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="shape-")
    _FOLDERS.append(folder)
    return write_shape(Path(folder.name), **changes)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def on_ranks(setups: tuple[Setup, ...]) -> list[dict[str, Outcome]]:
    """Outcomes by rank and setup name; all setups have the same number of ranks."""
    world = setups[0].cp * setups[0].tp
    if world == 1:
        return [run_setups(0, 1, setups)]
    return run_ranks(run_setups, world, list(setups), timeout=280)


@functools.cache
def reference(base: Setup) -> Outcome:
    """The same requests on one rank, one by one, each prefilled in one step."""
    out = Outcome()
    driver = Driver(base.alone())
    for number in range(max(map(len, TOGETHER))):
        request = driver.open(stream(number, LONGEST), slot=0)
        (answer,) = driver.prefill(Part(request=request, count=LONGEST, mtp_logits=True))
        out.logits.append((number, 0, rows_of(answer.logits)))
        out.mtp_logits.append((number, 0, rows_of(answer.mtp_logits)))
        driver.release(request)
    lengths = [(i, n) for step in TOGETHER for i, n in enumerate(step)]
    lengths += [(i, ends[-1] + DECODED) for i, ends in enumerate(CHUNKS)]
    for number, length in lengths:
        driver.reset()
        request = driver.open(stream(number, length), slot=5)
        driver.prefill(Part(request=request, count=length, logits=False))
        keep(driver, out, [(number, request)])
    driver.close()
    return out


def mesh(base: Setup, cp: int, tp: int, **changes: Any) -> Setup:
    """A setup on another mesh."""
    return replace(base, cp=cp, tp=tp, **changes)
