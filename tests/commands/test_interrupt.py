"""Ctrl-C and SIGTERM end the command and every rank, while serving and during the start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTED = b"join"  # both ranks are processes by then


def children(pid: int) -> set[int]:
    """Direct and indirect children of a process (Linux)."""
    found: set[int] = set()
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, listing.read_text().split()):
                found |= {child} | children(child)
        except OSError:
            continue
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("when", "number", "code"),
    [
        ("serving", signal.SIGINT, 130),
        ("starting", signal.SIGINT, 130),
        ("serving", signal.SIGTERM, 143),
    ],
)
def test_signals_leave_no_process(when: str, number: int, code: int, tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(ROOT / "launch.py"), "generate", "--prompt", "import os\n"),
        *("--config", str(ROOT / "configs" / "tiny_cpu_cp2.yaml"), "--max-tokens", "4000"),
        *("--set", f"model.path={ROOT / 'assets' / 'tiny-python'}", "--ignore-eos"),
        *("--set", "cluster.executor=local"),
    ]
    errors = tmp_path / "stderr"
    with (
        errors.open("wb") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, cwd=tmp_path, start_new_session=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if when == "serving":
                assert process.stdout.read(1), errors.read_text()
            else:
                deadline = time.monotonic() + 60
                while STARTED not in errors.read_bytes() and time.monotonic() < deadline:
                    time.sleep(0.02)
            ranks = children(process.pid)
            assert len(ranks) >= 2, errors.read_text()
            # As a terminal does: the whole foreground group gets Ctrl-C.
            os.killpg(process.pid, number)
            process.stdout.read()
            assert process.wait(30) == code, errors.read_text()
        finally:
            process.kill()
    deadline = time.monotonic() + 5
    while not all(map(is_gone, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(is_gone, ranks))
    assert "Traceback" not in errors.read_text()
