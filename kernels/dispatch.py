"""Which implementation of each op (``kernels.implementations``) runs on a device.

The first one whose needs the device meets is chosen, for the life of the process. There is no fallback:
if the chosen module cannot be imported or run, that is an error.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from kernels.contract import KernelContractError
from kernels.implementations import FASTER, FOLDERS, LOAD_TIME, Implementation, candidates
from kernels.platform import capability


def own(op: str, device: torch.device) -> Implementation:
    """The best implementation of ``op`` on ``device`` that needs no optional package.

    Raises:
        KernelContractError: an op without a line in the table.
    """
    if op not in FOLDERS:
        raise KernelContractError(f"op {op!r} is not in the dispatch table")
    cap = capability(device)
    return next(c for c in candidates(op) if c.backend is None and c.runs_on(cap))


def own_kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """The function of ``own``: what tests and benchmarks compare with a backend."""
    function: Callable[..., Any] = getattr(_module(own(op, device)), op)
    return function


def twin(op: str) -> Callable[..., Any]:
    """The torch twin of ``op``."""
    function: Callable[..., Any] = getattr(_module(candidates(op)[-1]), op)
    return function


@functools.cache
def _table(device_type: str, index: int) -> Mapping[str, Implementation]:
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, index)
    cap = capability(device)
    chosen = {op: next(c for c in candidates(op) if c.runs_on(cap)) for op in FOLDERS}
    return MappingProxyType(chosen)


@functools.cache
def _function(op: str, device_type: str, index: int) -> Callable[..., Any]:
    table = _table(device_type, index)
    if op not in table:
        raise KernelContractError(f"op {op!r} is not in the dispatch table")
    function: Callable[..., Any] = getattr(_module(table[op]), op)
    return function


def _module(choice: Implementation) -> ModuleType:
    if choice.backend is None:
        return importlib.import_module(choice.module)
    with choice.backend.named("loading it"):
        return importlib.import_module(choice.module)


def table(device: torch.device) -> Mapping[str, Implementation]:
    """The frozen choice for every op on ``device``; the same object on every call."""
    return _table(device.type, device.index or 0)


def kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs ``op`` on ``device``. Same parameters as the public op.

    Raises:
        KernelContractError: an op without a line in the table.
        PlatformError: a device type this project does not run on.
    """
    return _function(op, device.type, device.index or 0)


def describe(device: torch.device) -> list[tuple[str, str, str]]:
    """``(op, implementation, why)`` for every op on ``device``, in table order.

    An optional backend that is installed in another version is named beside what runs instead.
    """
    lines = []
    for op, choice in table(device).items():
        others = (c.backend for c in FASTER.get(op, ()) if device.type in c.device_types)
        unused = [note for backend in others if backend and (note := backend.unused())]
        lines.append((op, choice.name, "; ".join((choice.why, *unused))))
    return lines


def without_kernel(device: torch.device) -> list[str]:
    """Ops of served steps that run their torch twin although ``device`` is a GPU: named at start."""
    if device.type == "cpu":
        return []
    twins = [op for op, choice in table(device).items() if choice.name == "reference"]
    return [op for op in twins if FOLDERS[op] != LOAD_TIME]


def build(device: torch.device) -> None:
    """Compile what the chosen implementations need (their modules' ``build``), before serving.

    Raises:
        BuildError: a source that the compiler refuses, or no compiler.
        BackendError: an optional backend that is installed but does not work.
    """
    chosen = {choice.module: choice for choice in table(device).values()}
    builds = [
        (choice.backend, getattr(_module(choice), "build", None))
        for _, choice in sorted(chosen.items())
    ]
    # Our compilers are processes of their own and run side by side; those of backends know one thread.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        started = [pool.submit(call) for backend, call in builds if call and backend is None]
        for call in [call for backend, call in builds if call and backend is not None]:
            call()
        for build_one in started:
            build_one.result()
