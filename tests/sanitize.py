"""compute-sanitizer over all CUDA C++ kernels, on a GPU: ``python tests/sanitize.py`` (``make sanitize``).

The cases are those of ``tests/kernels/op_cases`` whose op runs CUDA C++ here, with few rows, memory
straight from the driver (so that one byte too far is seen), and only this project's kernels checked.
``--only TEXT`` takes the cases with TEXT in their name.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from kernels.dispatch import table
from tests.kernels.op_cases.base import BF16, Case, own_kernels, public
from tests.kernels.op_cases.table import CASES

TOOLS = ("memcheck", "racecheck")
# Kernels in the project's namespace, and those in a file's own.
FILTERS = ("kns=causeway", "regex=^_ZN[0-9]+_GLOBAL__N_")
CUDA = torch.device("cuda")


def chosen(only: str) -> list[Case]:
    """Cases of ops that CUDA C++ serves on this machine."""
    language = table(CUDA)
    return [c for c in CASES if c.gpu and language[c.op].name == "cuda" and only in str(c)]


def run_cases(only: str) -> None:
    """Every case with a few rows: fewer than a tile, and more than one."""
    cases = chosen(only)
    if not cases:
        raise SystemExit(f"no case of a CUDA C++ kernel has {only!r} in its name")
    for case in cases:
        for count in (3, 150):
            torch.manual_seed(count)
            inputs = case.make(count, CUDA, BF16)
            inputs.call(public(case.op), inputs.rows)
            torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"ran {case}", flush=True)


def check(tool: str, only: str) -> int:
    """Run the cases under ``tool`` in a process of their own; its exit status."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
    for text in FILTERS:
        command += ["--kernel-name", text]
    command += [sys.executable, __file__, "--run", "--only", only]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the cases without a tool")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: both")
    arguments = parser.parse_args()
    if arguments.run:
        with own_kernels():
            run_cases(arguments.only)
        return 0
    status = {tool: check(tool, arguments.only) for tool in arguments.tool or TOOLS}
    for tool, code in status.items():
        print(f"{tool}: {'clean' if code == 0 else f'exit status {code}'}")
    return max(status.values())


if __name__ == "__main__":
    sys.exit(main())
