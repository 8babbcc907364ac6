"""Every op's kernels on one GPU, in one command.

    python -m benchmarks.kernels [--only OP ...] [--json FILE] [--plot-only]

Compiles everything in several processes first, measures every case of ``benchmarks/*_cases.py``, and
writes ``benchmarks/results/kernels.json``, ``kernels.md`` and ``roofline.png`` (matplotlib: extra
``plot``), and the table of verdicts in docs/performance.md. With ``--only`` it writes nothing unless
``--json`` names a file; rows of other ops in that file are kept.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.case import Call, Case, eager_us, graph_us, implementation
from benchmarks.report import Row, page, read_json, with_verdicts, write_json
from kernels import dispatch

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
COMMAND = "python -m benchmarks.kernels"
COMPILERS = 12  # processes
OWN, LIBRARY = "", "library"  # variants that are timed, beside the backends' names

# Ops without a case, and why.
NO_CASE = {
    "act_quant": "load time and tests: torch twin only",
    "block_amax": "load time and tests: torch twin only",
    "dequant_fp4": "load time: torch twin only",
    "dequant_fp8": "load time: torch twin only",
    "fake_quant_fp4": "inside index_query and compress; alone only in tests",
    "fake_quant_fp8": "inside quant_rows, kv_norm_rope and compress; alone only in tests",
    "pack_fp4": "random weights and tests: torch twin only",
    "quant_fp8_weight": "random weights and tests: torch twin only",
    "prepare_weight": "load time",
    "prepare_experts": "load time",
    "round_entries": "inside kv_insert; alone only where pages are not fp8",
    "expert_ffn": "quant_rows and expert_ffn_quant, each with its cases",
    "peer_sum": "needs several GPUs: benchmarks/small_sums.py",
    "compress": "compress_insert, without the store",
}


def all_cases(only: Sequence[str] = ()) -> Iterator[Case]:
    """Cases of every module ``*_cases.py``, or of some ops; makes nothing on the device."""
    for path in sorted(Path(__file__).parent.glob("*_cases.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        yield from (case for case in module.cases() if not only or case.op in only)


def measure(case: Case) -> list[Row]:
    """The own kernel's row, and one for each backend that can serve the call."""
    timed = case.make()
    own_name = implementation(case.op)
    in_graph: dict[str, Sequence[Call]] = {}
    eager: dict[str, Sequence[Call]] = {}
    # A twin may read values back: no graph holds it.
    (eager if own_name == "reference" else in_graph)[OWN] = timed.calls
    if timed.library:
        (in_graph if timed.library_in_graph else eager)[LIBRARY] = timed.library
    in_graph.update(timed.backends)
    us = graph_us(in_graph) | {name: eager_us(calls) for name, calls in eager.items()}
    library_us = us.pop(LIBRARY, None)
    return [_row(case, name or own_name, value, library_us) for name, value in us.items()]


def _row(case: Case, name: str, us: float, library_us: float | None) -> Row:
    return Row(
        op=case.op,
        shape=case.shape,
        implementation=name,
        us=round(us, 2),
        tflops=round(case.flops / us / 1e6, 1) if case.flops else None,
        tbps=round(case.moved / us / 1e6, 4) if case.moved else None,
        share_of_limit=round(case.limit_us / us, 3),
        library=None if library_us is None else case.library,
        library_us=None if library_us is None else round(library_us, 2),
        hardware=torch.cuda.get_device_name(),
        date=datetime.now(UTC).date().isoformat(),
    )


def compile_share(share: int, shares: int, only: Sequence[str]) -> None:
    """Build and run once every ``shares``-th case: one of the processes that fill the caches.

    A case that raises is left to the measurement, which names it.
    """
    for index, case in enumerate(all_cases(only)):
        if index % shares != share:
            continue
        try:
            timed = case.make()
            for calls in (timed.calls, timed.library, *timed.backends.values()):
                if calls:
                    calls[0]()
            torch.cuda.synchronize()
            del timed
        except Exception as err:
            print(f"{case.op} {case.shape}: {err}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()


def compile_all(only: Sequence[str]) -> None:
    """Fill the caches of compiled kernels from several processes.

    Raises:
        RuntimeError: a process failed; its output is above.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    builders = sorted({choice.module for choice in dispatch.table(device).values()})
    build = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    getattr(importlib.import_module(name), 'build', lambda: None)()"
    )
    _together([[sys.executable, "-c", build, *builders[i::COMPILERS]] for i in range(COMPILERS)])
    arguments = ["--only", *only] if only else []
    run = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    _together([[*run, "--compile", f"{i}/{COMPILERS}"] for i in range(COMPILERS)])


def _together(commands: list[list[str]]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    root = Path(__file__).resolve().parents[1]
    running = [subprocess.Popen(command, cwd=root, env=environment) for command in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"processes that compile failed (their output is above): {codes}")


def show(row: Row) -> str:
    """A row as text."""
    other = "" if row.library_us is None else f"  {row.library} {row.library_us:.2f} us"
    return (
        f"{row.op:18} {row.shape:62} {row.implementation:9} {row.us:9.2f} us {row.tflops or 0:7.1f} TF/s"
        f" {row.tbps or 0:6.3f} TB/s {row.share_of_limit:6.1%}{other}"
    )


def write(rows: Sequence[Row], path: Path) -> None:
    """The file of rows, the page and the picture beside it; of the project's own results also the table
    in docs/performance.md.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(rows, path)
    path.with_suffix(".md").write_text(page(rows, COMMAND), encoding="utf-8")
    if path.resolve().parent == RESULTS.resolve():
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(with_verdicts(text, rows), encoding="utf-8")
    # Imported here: matplotlib is an extra that a measurement does not need.
    importlib.import_module("benchmarks.roofline").draw(rows, path.with_name("roofline.png"))


def main() -> None:
    """Compile, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=[], metavar="OP", help="ops to measure")
    parser.add_argument(
        "--json", type=Path, help="file for the rows (default: results/kernels.json)"
    )
    parser.add_argument(
        "--plot-only", action="store_true", help="page and picture of a file's rows"
    )
    parser.add_argument("--no-compile", action="store_true", help="the caches are full")
    parser.add_argument(
        "--compile", metavar="I/N", help="only build the I-th of N shares of the cases"
    )
    args = parser.parse_args()
    path = args.json or (None if args.only else RESULTS / "kernels.json")
    if args.plot_only:
        path = path or RESULTS / "kernels.json"
        write(read_json(path), path)
        return
    if args.compile:
        share, shares = (int(n) for n in args.compile.split("/"))
        compile_share(share, shares, args.only)
        return
    begin = time.perf_counter()
    if not args.no_compile:
        compile_all(args.only)
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rows, failed = measure_all(all_cases(args.only))
    if path is not None:
        kept = read_json(path) if args.only and path.exists() else []
        write([*(row for row in kept if row.op not in args.only), *rows], path)
    print(f"{len(rows)} rows in {time.perf_counter() - begin:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(f'{case.op} {case.shape}' for case in failed)}")


def measure_all(cases: Iterable[Case]) -> tuple[list[Row], list[Case]]:
    """Rows of all cases, printed as they come, and the cases that raised."""
    rows: list[Row] = []
    failed = []
    for case in cases:
        torch.cuda.empty_cache()
        try:
            made = measure(case)
        except Exception:  # the others' rows are not lost for it; the command fails at its end
            traceback.print_exc()
            failed.append(case)
            continue
        rows += made
        print("\n".join(map(show, made)), flush=True)
    return rows, failed


if __name__ == "__main__":
    main()
