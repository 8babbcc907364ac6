"""What this machine has: the only place that asks torch about devices."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

DEVICE_CHOICES = ("auto", "cpu", "cuda")


class PlatformError(RuntimeError):
    """The configured device does not exist on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What one device offers.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        name: the device's own name.
        compute: CUDA compute capability (major, minor); (0, 0) on the CPU.
        memory_bytes: physical memory of the device (of the whole machine for the CPU).
        count: devices of this type that the process can see; 1 for the CPU.
    """

    device_type: str
    name: str
    compute: tuple[int, int]
    memory_bytes: int
    count: int


def resolve_device(choice: str, index: int = 0) -> torch.device:
    """Turn ``device: auto | cpu | cuda`` into a device. ``auto`` is CUDA where there is one.

    Args:
        choice: the configured value.
        index: which CUDA device, counted within those this process can see.

    Raises:
        PlatformError: unknown value, ``cuda`` on a machine without it, or no device ``index``.
    """
    if choice not in DEVICE_CHOICES:
        raise PlatformError(f"device = {choice!r}, allowed: {', '.join(DEVICE_CHOICES)}")
    if choice == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if choice == "auto":
            return torch.device("cpu")
        raise PlatformError(
            "device = 'cuda', but this process sees no CUDA device"
            f" (torch {torch.__version__}, built for CUDA: {torch.version.cuda or 'no'})"
        )
    if not 0 <= index < count:
        raise PlatformError(f"CUDA device index {index}, allowed: 0..{count - 1}")
    return torch.device("cuda", index)


def dist_backend(device: torch.device) -> str:
    """Name of the torch.distributed backend for tensors on ``device``: ``gloo`` or ``nccl``.

    Raises:
        PlatformError: a device type without a backend here.
    """
    backends = {"cpu": "gloo", "cuda": "nccl"}
    if device.type not in backends:
        raise PlatformError(f"no distributed backend for device {device}, allowed: cpu, cuda")
    return backends[device.type]


def capability(device: torch.device) -> Capability:
    """Describe ``device``.

    Raises:
        PlatformError: a device type this project does not run on.
    """
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Capability(
            device_type="cpu", name="CPU", compute=(0, 0), memory_bytes=memory, count=1
        )
    if device.type != "cuda":
        raise PlatformError(f"device {device} is not supported, allowed: cpu, cuda")
    properties = torch.cuda.get_device_properties(device)
    return Capability(
        device_type="cuda",
        name=properties.name,
        compute=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        count=torch.cuda.device_count(),
    )


def use_device(device: torch.device) -> None:
    """Make ``device`` the process's current one (CUDA; nothing to do for the CPU)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a CUDA device, after the allocator gave back what it only holds.

    Raises:
        PlatformError: not a CUDA device.
    """
    if device.type != "cuda":
        raise PlatformError(f"free memory of {device} is not tracked, allowed: cuda")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free, total
