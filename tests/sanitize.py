"""compute-sanitizer over all CUDA C++ kernels, on a GPU: ``python tests/sanitize.py`` (``make sanitize``).

The cases are those of ``tests/kernels/op_cases`` whose op runs CUDA C++ here, with few rows, memory
straight from the driver (so that one byte too far is seen), and only this project's kernels checked;
and every tile of the FP8 products (``sanitize_tiles``).
``--only TEXT`` (again and again) takes what has TEXT in its name.
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
from pathlib import Path
from unittest import mock

import torch

from kernels import nvcc
from kernels.dispatch import build, table
from tests.kernels.op_cases.base import BF16, Case, own_kernels, public
from tests.kernels.op_cases.table import CASES
from tests.sanitize_tiles import tiles

TOOLS = ("memcheck", "racecheck")
# Kernels in the project's namespace, and those in a file's own.
FILTERS = ("kns=causeway", "regex=^_ZN[0-9]+_GLOBAL__N_")
CUDA = torch.device("cuda")
# Fewer rows than a tile, and more than one.
COUNTS = (3, 150)
# The same where the number of rows chooses one of many tiles.
COUNTS_OF_PRODUCTS = (3, 20, 50, 100, 150)
PRODUCTS = ("linear", "linear_quant", "grouped_output", "grouped_output_quant", "moe_gate")


def run_case(case: Case) -> None:
    """With few rows."""
    for count in COUNTS_OF_PRODUCTS if case.op in PRODUCTS else COUNTS:
        torch.manual_seed(count)
        inputs = case.make(count, CUDA, BF16)
        inputs.call(public(case.op), inputs.rows)
        torch.cuda.synchronize()


def work(only: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything with a text of ``only`` in its name, that CUDA C++ serves on this machine."""
    language = table(CUDA)
    everything = [
        (str(c), partial(run_case, c)) for c in CASES if c.gpu and language[c.op].name == "cuda"
    ]
    everything += tiles()
    for name, run in everything:
        if any(text in name for text in only):
            yield name, run


def run_all(only: list[str]) -> None:
    start = time.time()
    for name, run in work(only):
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"ran {name} {time.time() - start:.1f} s", flush=True)


@contextmanager
def line_numbers() -> Iterator[None]:
    """Inside, kernels are built with what leads an instruction back to its line."""
    with mock.patch.object(nvcc, "_FLAGS", (*nvcc._FLAGS, "-lineinfo")):
        yield


def check(tool: str, only: list[str]) -> int:
    """Run the cases under ``tool`` in a process of their own; its exit status."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", "--print-limit", "0"]
    for text in FILTERS:
        command += ["--kernel-name", text]
    command += [sys.executable, __file__, "--run"]
    for text in only:
        command += ["--only", text]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the cases without a tool")
    parser.add_argument("--only", action="append", help="cases with this in their name")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: both")
    arguments = parser.parse_args()
    only = arguments.only or [""]
    with own_kernels(), line_numbers():
        if arguments.run:
            run_all(only)
            return 0
        build(CUDA)
    status = {tool: check(tool, only) for tool in arguments.tool or TOOLS}
    for tool, code in status.items():
        print(f"{tool}: {'clean' if code == 0 else f'exit status {code}'}")
    return max(status.values())


if __name__ == "__main__":
    sys.exit(main())
