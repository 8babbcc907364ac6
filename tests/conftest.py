"""Shared test habits: markers, one seed per test, poisoned allocations, one thread per process."""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks and tests share few cores

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

MARKERS = (
    "gpu: needs a CUDA device",
    "ray: starts Ray",
    "oracle: compares with an independent implementation",
    "benchmark: prints a time; runs only with --run-benchmark",
    "full: only in `make test-full`",
    "slow: more than a few seconds",
)

# Folders whose code runs in the pytest process and must write every element of what it allocates.
POISONED = ("tests/kernels", "tests/model")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-benchmark", action="store_true", help="run the benchmark cases too")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_benchmark = pytest.mark.skip(reason="a benchmark: run with --run-benchmark")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "benchmark" in item.keywords and not config.getoption("--run-benchmark"):
            item.add_marker(no_benchmark)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch, numpy and random by the test's id: alone or among many, it sees the same."""
    value = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        out = allocate(*args, **kwargs)
        if out.device.type != "meta" and out.dtype.is_floating_point and out.dtype.itemsize > 1:
            out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN, so that an unwritten output shows."""
    path = request.path.relative_to(ROOT).as_posix()
    if path.startswith(POISONED) and "benchmark" not in request.keywords:
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_python() -> Path:
    """The trained tiny checkpoint."""
    return ROOT / "assets" / "tiny-python"
