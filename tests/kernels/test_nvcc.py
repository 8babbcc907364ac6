"""The cache of compiled libraries: what is in its key, and ranks that build the same one at once."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import nvcc

# Takes the place of nvcc: writes its output in two parts, or refuses.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "$VERSION"; exit 0; }
while [ "$1" != -o ]; do shift; done
case "$*" in *refused*) echo "no such thing" >&2; exit 1;; esac
printf first > "$2"; sleep 0.05; printf second >> "$2"
"""
# Imports every implementation as on a GPU machine, and says which files each library's key covers.
BUILDS = """
import importlib, json, sys
from pathlib import Path
from unittest import mock
for name in ("triton", "triton.language", "triton.language.extra", "triton.language.extra.cuda",
             "triton.language.extra.libdevice"):
    sys.modules.setdefault(name, mock.MagicMock())
from kernels import nvcc
read, libraries, real = [], [], Path.read_bytes
def read_bytes(path):
    read.append(str(path))
    return real(path)
def build(units, target):
    libraries.append({"units": list(map(str, units)), "covered": list(read)})
    read.clear()
with (
    mock.patch.object(Path, "read_bytes", read_bytes), mock.patch.object(nvcc, "_build", build),
    mock.patch.object(nvcc, "compiler", lambda: ("nvcc", "none")),
    mock.patch.object(nvcc, "cache_directory", lambda: Path("nowhere")),
    mock.patch.object(nvcc.ctypes, "CDLL", mock.MagicMock()),
):
    for path in sorted(Path("kernels").glob("*/cuda_impl.py")):
        if "load_library" in path.read_text() or "def build" in path.read_text():
            importlib.import_module(".".join(path.with_suffix("").parts)).build()
print(json.dumps(libraries))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler and a cache of this test's own."""
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(COMPILER)
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CAUSEWAY_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VERSION", "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Path(name).read_text())
    nvcc.compiler.cache_clear()
    nvcc.load_library.cache_clear()
    yield tmp_path
    nvcc.compiler.cache_clear()
    nvcc.load_library.cache_clear()


def test_ranks_that_build_at_once_see_whole_libraries_vllm_49165(fake: Path) -> None:
    source = fake / "op.cu"
    source.write_text("code")
    build = (
        nvcc.load_library.__wrapped__
    )  # every rank has a process, and with it a memory, of its own
    with ThreadPoolExecutor(8) as ranks:
        found = list(ranks.map(lambda _: build(source), range(24)))
    assert set(found) == {"firstsecond"}
    (library,) = (fake / "cache").iterdir()
    assert library.name.startswith("op-")


def test_whatever_is_compiled_is_in_the_key(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, header = fake / "op.cu", fake / "op.cuh"
    source.write_text("code")
    header.write_text("one")

    def libraries() -> int:
        nvcc.compiler.cache_clear()
        nvcc.load_library.cache_clear()
        nvcc.load_library(source, header)
        return len(list((fake / "cache").iterdir()))

    assert [libraries(), libraries()] == [1, 1]
    header.write_text("two")
    assert libraries() == 2
    source.write_text("more code")
    assert libraries() == 3
    monkeypatch.setenv("VERSION", "2")
    assert libraries() == 4
    monkeypatch.setattr(nvcc, "_FLAGS", (*nvcc._FLAGS, "-G"))
    assert libraries() == 5


def test_a_refused_source_and_a_missing_compiler_are_named(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fake / "refused.cu"
    source.write_text("code")
    with pytest.raises(nvcc.BuildError, match=r"refused\.cu failed:\nno such thing"):
        nvcc.load_library(source)
    assert list((fake / "cache").iterdir()) == []
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    nvcc.compiler.cache_clear()
    with pytest.raises(nvcc.BuildError, match="nvcc not found"):
        nvcc.compiler()


def test_every_header_of_a_library_is_in_its_key(repo_root: Path) -> None:
    """Otherwise an old library would serve a changed header."""
    done = subprocess.run(
        [sys.executable, "-c", BUILDS], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    libraries = json.loads(done.stdout)
    assert len(libraries) > 10
    for library in libraries:
        covered = {Path(path).resolve() for path in library["covered"]}
        seen, left = set(), [Path(unit).resolve() for unit in library["units"]]
        while left:
            path = left.pop()
            seen.add(path)
            for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
                near = (path.parent / name).resolve()
                found = near if near.is_file() else (nvcc.COMMON / name).resolve()
                if found not in seen:
                    left.append(found)
        assert seen <= covered, sorted(map(str, seen - covered))
