"""The table of known bug classes names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_named_test_exists(repo_root: Path) -> None:
    page = (repo_root / "docs" / "regressions.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\(", (repo_root / "tests" / file).read_text(), re.MULTILINE)
    ]
    assert missing == []


def test_every_numbered_test_is_in_the_table(repo_root: Path) -> None:
    """A regression test without its row would not be found by whoever reads the table."""
    page = (repo_root / "docs" / "regressions.md").read_text(encoding="utf-8")
    folder = repo_root / "tests"
    numbers = {
        number
        for path in folder.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
        for number in re.findall(r"(?:vllm|sglang|atom|mlx_lm)_(\d+)", name)
    }
    assert numbers
    assert {n for n in numbers if n not in page} == set()
