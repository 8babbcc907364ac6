"""CUDA C++: one launch, two values a thread."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from kernels import nvcc
from kernels.peer_sum.api import BLOCKS, MOST_RANKS, WORDS, PeerBoxes

_SOURCE = Path(__file__).parent / "cuda" / "peer_sum.cu"


class _PeerSum(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("boxes", ctypes.c_void_p * MOST_RANKS),
        ("rounds", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("box", ctypes.c_int64),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(_SOURCE)
    library.causeway_peer_sum.argtypes = (ctypes.POINTER(_PeerSum), ctypes.c_void_p)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def peer_sum(x: Tensor, peers: PeerBoxes) -> None:
    """See ``kernels.peer_sum.api.peer_sum``."""
    arguments = _PeerSum(
        x=x.data_ptr(),
        boxes=(ctypes.c_void_p * MOST_RANKS)(*(box.data_ptr() for box in peers.boxes)),
        rounds=peers.rounds.data_ptr(),
        words=x.numel() // 2,
        box=BLOCKS * WORDS,
        rank=peers.rank,
        size=len(peers.boxes),
    )
    code = _library().causeway_peer_sum(ctypes.byref(arguments), nvcc.stream(x))
    nvcc.check_launch("peer_sum", code)
