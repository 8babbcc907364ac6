"""Pages that show what the code draws must show what it draws now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.mesh_view import cut_picture, mesh_picture
from model.parallel.config import ParallelConfig
from model.parallel.partition import Chunk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mesh.md"


def drawn(label: str) -> str:
    """What belongs below ``<!-- label -->``: ``mesh cp=2 tp=2`` or ``cut cp=2 0..1500``."""
    kind, *words = label.split()
    sizes = {key: int(value) for key, value in re.findall(r"(cp|tp)=(\d+)", label)}
    parallel = ParallelConfig(**sizes, cp_min_tokens=0)
    if kind == "mesh":
        return mesh_picture(parallel)
    chunks = [Chunk(*map(int, word.split(".."))) for word in words if ".." in word]
    return cut_picture(chunks, parallel)


def blocks() -> list[tuple[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"<!-- (.*?) -->\n```text\n(.*?)```", text, re.S)


@pytest.mark.parametrize(("label", "text"), blocks(), ids=[label for label, _ in blocks()])
def test_mesh_page_shows_the_real_cut(label: str, text: str) -> None:
    assert text == drawn(label) + "\n"


def test_mesh_page_has_its_pictures() -> None:
    assert len(blocks()) == 3
