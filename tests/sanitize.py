"""compute-sanitizer over all CUDA C++ kernels, on a GPU: ``python tests/sanitize.py`` (``make sanitize``).

The cases are those of ``tests/kernels/op_cases`` whose op runs CUDA C++ here, with few rows, and what
``sanitize_more`` has; only this project's kernels are checked. ``--only TEXT`` (again and again) takes
what has TEXT in its name. racecheck's reports are compared with ``sanitize_known``: anything that is not
in that list fails.

Several processes (``--jobs``) work under a tool each and take the cases of one op after the other: most
of a process's first seconds are its start, and what torch loads for the kernels that make arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from kernels import nvcc
from kernels.dispatch import build, table
from tests.kernels.op_cases.base import BF16, Case, own_kernels, public
from tests.kernels.op_cases.table import CASES
from tests.sanitize_jobs import DONE, Worker, run_all
from tests.sanitize_more import CASES as MORE_CASES
from tests.sanitize_more import more

TOOLS = ("racecheck", "memcheck")
# memcheck sees a byte too far where memory comes straight from the driver; racecheck looks at shared memory.
ENVIRONMENT = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
# Kernels in the project's namespace, and those in a file's own.
FILTERS = ("kns=causeway", "regex=^_ZN[0-9]+_GLOBAL__N_")
CUDA = torch.device("cuda")
FIRST_PORT, PORTS = 49152, 10  # of a tool's process; those that run side by side must not meet
# Fewer rows than a tile, and more than one.
COUNTS = (3, 150)
# The same for ops or cases where the number of rows chooses one of several kernels.
OTHER_COUNTS = {
    "linear_quant": (3, 20, 50, 100, 150),
    "linear": (3, 20, 50, 100, 150),
    "moe_gate": (3, 20, 50, 150),
    "swiglu_quant": (3, 400),
    "index_score": (3, 150, 300),
    "index_topk": (3, 150, 300),
    "compress-128_of_128": (3, 600),
    "compress_insert-128_of_128": (3, 600),
    "quant_rows-many": (700,),
    "swiglu_quant-many": (700,),
}
# Cases that launch nothing of CUDA C++: Triton or the torch twin serves their shapes.
ELSEWHERE = {
    *(f"{op}-odd" for op in ("compress", "compress_insert", "compress_decode", "grouped_output")),
    *(f"{op}-odd" for op in ("kv_norm_rope", "qkv_norm_rope")),
    *(
        f"{op}-{name}"
        for op in ("hc_pre", "hc_head", "hc_post_pre")
        for name in ("odd", "two_streams")
    ),
    *(f"hc_post-{name}" for name in ("flash", "pro", "odd", "two_streams")),
    "kv_insert-latent_fp32",
}
# Groups of `grouped` that take longest: their kernels wait for blocks that the tools bring one after the
# other, and several such processes side by side take more than twice the time.
LONG = ("hc", "moe_permute")
# Ops whose CUDA kernels take float32 rows too.
FLOAT_ROWS = (
    "quant_rows",
    "rms_norm_quant",
    "swiglu_quant",
    "q_norm_rope",
    "kv_norm_rope",
    "kv_insert",
    "qkv_norm_rope",
    "index_query",
    "compress",
    "compress_insert",
    "compress_decode",
    "merge_lse",
)


def run_case(case: Case) -> None:
    """With few rows."""
    dtypes = (BF16, torch.float32) if case.op in FLOAT_ROWS else (BF16,)
    counts = OTHER_COUNTS.get(str(case)) or OTHER_COUNTS.get(case.op, COUNTS)
    for count, dtype in product(counts, dtypes):
        torch.manual_seed(count)
        inputs = case.make(count, CUDA, dtype)
        inputs.call(public(case.op), inputs.rows)
        torch.cuda.synchronize()


def work() -> dict[str, Callable[[], None]]:
    """All that CUDA C++ serves here, by name."""
    language = table(CUDA)
    named: dict[str, Callable[[], None]] = dict(more())
    for case in (*CASES, *MORE_CASES):
        if case.gpu and language[case.op].name == "cuda" and str(case) not in ELSEWHERE:
            named[str(case)] = partial(run_case, case)
    return named


def serve(names: Iterable[str]) -> None:
    """Run what is named, line by line, and say so, with the number of launches from CUDA C++."""
    named = work()
    build(CUDA)
    with counted_launches() as launches:
        for name in names:
            before = launches.total()
            named[name.strip()]()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            print(DONE, launches.total() - before, flush=True)


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Inside, launches of CUDA C++ are counted by op, of the modules that are loaded."""
    check, launches = nvcc.check_launch, Counter[str]()

    def count(op: str, code: int) -> None:
        launches[op] += 1
        check(op, code)

    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            if vars(module).get("check_launch") is check:
                stack.enter_context(mock.patch.object(module, "check_launch", count))
        yield launches


def grouped(names: Iterable[str]) -> list[list[str]]:
    """Cases of an op together, since the same kernels of torch make their arguments.

    ``LONG`` come first, then where there are most.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = re.sub(r"-\d+$" if name.startswith("tile") else "(_quant)?-.*", "", name)
        groups.setdefault("hc" if kind.startswith("hc_") else kind, []).append(name)
    kinds = sorted(groups, key=lambda kind: (kind in LONG, len(groups[kind])), reverse=True)
    return [groups[kind] for kind in kinds]


@contextmanager
def line_numbers() -> Iterator[None]:
    """Inside, kernels are built with what leads an instruction back to its line."""
    with mock.patch.object(nvcc, "_FLAGS", (*nvcc._FLAGS, "-lineinfo")):
        yield


def start(tool: str, job: int) -> Worker:
    """This file's ``--serve`` under ``tool``."""
    # What the process starts itself (compilers of Triton's kernels) is not looked at.
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "application-only"]
    command += ["--print-limit", "0", "--launch-timeout", "60", "--show-backtrace", "device"]
    command += ["--port", str(FIRST_PORT + job * PORTS)]
    for text in FILTERS:
        command += ["--kernel-name", text]
    command += [sys.executable, __file__, "--serve"]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return Worker(command, os.environ | {"PYTHONPATH": path} | ENVIRONMENT[tool])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="run cases by name, without a tool")
    parser.add_argument("--only", action="append", help="cases with this in their name")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: both")
    parser.add_argument("--jobs", type=int, default=6, help="processes side by side")
    arguments = parser.parse_args()
    began = time.time()
    with own_kernels(), line_numbers():
        if arguments.serve:
            serve(sys.stdin)
            return 0
        names = [name for name in work() if any(text in name for text in arguments.only or [""])]
        if not names:
            raise SystemExit(f"nothing of CUDA C++ has one of {arguments.only} in its name")
        build(CUDA)
    built = time.time()
    groups = dict.fromkeys(arguments.tool or TOOLS, grouped(names))
    results = run_all(groups, arguments.jobs, start)
    for (tool, entry), count in results.known.items():
        print(f"{tool}: {count} pairs of accesses that are ordered: {entry.why}")
    for (tool, name), text in results.wrong.items():
        print(f"{tool}: {name}: WRONG: {text.splitlines()[0]}")
    for tool, count in results.passed.items():
        print(f"{tool}: {count} of {len(names)} cases: nothing but what is known")
    print(f"{built - began:.0f} s until all was built, then {time.time() - built:.0f} s")
    return int(bool(results.wrong))


if __name__ == "__main__":
    sys.exit(main())
