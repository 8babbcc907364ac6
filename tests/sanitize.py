"""compute-sanitizer over all CUDA C++ kernels, on a GPU: ``python tests/sanitize.py`` (``make sanitize``).

The cases are those of ``tests/kernels/op_cases`` whose op runs CUDA C++ here, with few rows, memory
straight from the driver (so that one byte too far is seen), and only this project's kernels checked;
and what ``sanitize_more`` has.
``--only TEXT`` (again and again) takes what has TEXT in its name; ``--part I/N`` every N-th of that, so
that N processes share the work. racecheck's reports are compared with ``sanitize_known``: anything that
is not in that list fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from kernels import nvcc
from kernels.dispatch import build, table
from tests.kernels.op_cases.base import BF16, Case, own_kernels, public
from tests.kernels.op_cases.table import CASES
from tests.sanitize_known import Reports
from tests.sanitize_more import CASES as MORE_CASES
from tests.sanitize_more import more

TOOLS = ("memcheck", "racecheck")
# Kernels in the project's namespace, and those in a file's own.
FILTERS = ("kns=causeway", "regex=^_ZN[0-9]+_GLOBAL__N_")
CUDA = torch.device("cuda")
FIRST_PORT, PORTS = 49152, 10  # of a tool; parts that run side by side must not meet
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


def work(only: list[str], part: tuple[int, int] = (0, 1)) -> dict[str, Callable[[], None]]:
    """What has a text of ``only`` in its name, and of that a part, that CUDA C++ serves here."""
    language = table(CUDA)
    all_: dict[str, Callable[[], None]] = dict(more())
    for case in (*CASES, *MORE_CASES):
        if case.gpu and language[case.op].name == "cuda":
            all_[str(case)] = partial(run_case, case)
    names = [name for name in all_ if any(text in name for text in only)]
    first, step = part
    return {name: all_[name] for name in names[first::step]}


def run_all(chosen: dict[str, Callable[[], None]]) -> None:
    """One after the other."""
    start = time.time()
    for name, run in chosen.items():
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"ran {name} {time.time() - start:.1f} s", flush=True)


@contextmanager
def line_numbers() -> Iterator[None]:
    """Inside, kernels are built with what leads an instruction back to its line."""
    with mock.patch.object(nvcc, "_FLAGS", (*nvcc._FLAGS, "-lineinfo")):
        yield


def check(tool: str, arguments: list[str], port: int) -> str:
    """Run the work under ``tool`` in a process of its own; what is wrong, or nothing."""
    # What the process starts itself (compilers of Triton's kernels) is not looked at.
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "application-only"]
    command += ["--print-limit", "0", "--launch-timeout", "60", "--port", str(port)]
    for text in FILTERS:
        command += ["--kernel-name", text]
    command += [sys.executable, __file__, "--run", *arguments]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    reports = Reports()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if reports.read(line):
                print(line, end="", flush=True)
    for entry, count in reports.known.items():
        print(f"{tool}: {count} pairs of accesses that are ordered: {entry.why}")
    for text in reports.new:
        print(f"{tool}: NEW\n{text}")
    if process.returncode:
        return f"exit status {process.returncode}"
    if reports.new:
        return f"{len(reports.new)} findings"
    return "" if reports.complete else "the tool's summary is missing or names more reports"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the cases without a tool")
    parser.add_argument("--only", action="append", help="cases with this in their name")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th of them from the I-th on")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: both")
    arguments = parser.parse_args()
    only = arguments.only or [""]
    first, step = map(int, arguments.part.split("/"))
    with own_kernels(), line_numbers():
        chosen = work(only, (first, step))
        if not chosen:
            raise SystemExit(f"nothing of CUDA C++ has one of {only} in its name")
        if arguments.run:
            run_all(chosen)
            return 0
        build(CUDA)
    passed = [f"--only={text}" for text in only] + [f"--part={arguments.part}"]
    port = FIRST_PORT + first * PORTS
    wrong = {tool: check(tool, passed, port) for tool in arguments.tool or TOOLS}
    for tool, text in wrong.items():
        print(f"{tool}: {text or 'nothing but what is known'}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
