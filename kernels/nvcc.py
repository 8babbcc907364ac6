"""CUDA C++ sources -> shared library: compiled by nvcc at first use, kept in a cache directory.

The libraries have a C interface (raw pointers, sizes, a stream) and no tie to torch's ABI, so one
build serves every torch version. The cache key covers the sources, the headers, the flags and the
compiler; a changed file can never meet an old library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

COMMON = Path(__file__).parent / "cuda_common"  # headers that ops share
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--shared",
    "-Xcompiler=-fPIC",
)


class BuildError(RuntimeError):
    """nvcc is missing, or refused a source of this project."""


def cache_directory() -> Path:
    """Where compiled libraries are kept: ``CAUSEWAY_KERNEL_CACHE`` or the user's cache directory."""
    chosen = os.environ.get("CAUSEWAY_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "causeway" / "kernels"


@functools.cache
def compiler() -> tuple[str, str]:
    """Path and version text of nvcc.

    Raises:
        BuildError: no nvcc in ``CUDA_HOME``, on the path or in /usr/local/cuda.
    """
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    home = os.environ.get("CUDA_HOME")
    if home:
        candidates.insert(0, str(Path(home) / "bin" / "nvcc"))
    for path in candidates:
        if path and Path(path).is_file():
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return path, done.stdout
    raise BuildError("nvcc not found in CUDA_HOME, on the path or in /usr/local/cuda/bin")


@functools.cache
def load_library(*sources: Path) -> ctypes.CDLL:
    """The library built from ``sources`` (and the common headers), compiled if it is not cached.

    Raises:
        BuildError: nvcc is missing or fails; the message holds its output.
    """
    digest = hashlib.sha256()
    for source in (*sources, *sorted(COMMON.glob("*.cuh"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((*_FLAGS, compiler()[1])).encode())
    target = cache_directory() / f"{sources[0].stem}-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        _build([s for s in sources if s.suffix == ".cu"], target)
    return ctypes.CDLL(str(target))


def _build(units: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A private file first: several ranks may build the same library at once.
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        # A library's sources side by side, on as many cores as there are.
        command = [compiler()[0], *_FLAGS, "--threads=0", f"-I{COMMON}", "-o", scratch]
        command += map(str, units)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        os.chmod(scratch, 0o755)  # mkstemp made it private
        os.replace(scratch, target)
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)


def stream(tensor: Tensor) -> ctypes.c_void_p:
    """The current CUDA stream of the tensor's device, as an argument of a library call."""
    # As the streams of torch.cuda, without their objects: every launch of every step comes here.
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(tensor.get_device()))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Address of the first element, null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def check_launch(op: str, code: int) -> None:
    """Raise for a CUDA error code that a launcher returned.

    Raises:
        RuntimeError: ``code`` is not 0.
    """
    if code != 0:
        raise RuntimeError(f"{op}: the CUDA launch failed with error {code}")
