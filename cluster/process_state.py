"""What the kernel says about a process of this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

_TAIL_BYTES = 2000
_TAIL_LINES = 3


def describe_exit(code: int | None) -> str:
    """A return code of ``subprocess`` in words."""
    if code is None:
        return "running"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return f"killed by signal {-code}{name}"


def process_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal; known on Linux only."""
    return _state(pid) in ("T", "t")


def process_gone(pid: int) -> bool:
    """Whether the process has ended (one that nobody has waited for yet counts as ended)."""
    if _state(pid) == "Z":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def log_tail(path: Path | None) -> str:
    """The last lines of a log on one line; empty without a log."""
    if path is None:
        return ""
    try:
        text = path.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-_TAIL_LINES:])


def _state(pid: int) -> str:
    """The state letter of ``/proc``; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
