"""CUDA C++: one pass over the logits; a cluster, or a launch behind, merges the parts of a row."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.page_cache.cuda_pages import is_aligned
from kernels.qkv_norm_rope.cuda_impl import CLUSTER
from kernels.sample_partial.api import PartialSample

_SOURCES = (Path(__file__).parent / "cuda" / "sample.cu", CLUSTER)
_UNIT = 2048  # columns whose exponentials are one sum


class _Sample(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "temperature", "peak", "seeds", "steps")),
        *((name, ctypes.c_void_p) for name in ("score", "lse", "ids")),
        *((name, ctypes.c_void_p) for name in ("unit_sums", "part_scores", "part_columns")),
        *((name, ctypes.c_int64) for name in ("stride", "offset")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "wide", "units")),
        *((name, ctypes.c_int) for name in ("per_block", "parts")),  # set by the launcher
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(*_SOURCES)
    library.causeway_sample_partial.argtypes = (ctypes.POINTER(_Sample), ctypes.c_void_p)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def sample_partial(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    vocab_offset: int,
    vocab_size: int,
    peak: Tensor | None = None,
) -> PartialSample:
    """See ``kernels.sample_partial.api.sample_partial``."""
    count, columns = logits.shape[0], min(logits.shape[1], vocab_size - vocab_offset)
    top = logits[:, :columns].amax(-1) if peak is None else peak
    score, lse = logits.new_empty(count), logits.new_empty(count)
    ids = torch.empty(count, dtype=torch.int64, device=logits.device)
    units = -(-columns // _UNIT)
    parts = logits.new_empty((3, count, units))  # sums, scores and columns of parts of rows
    call = _Sample(
        logits=logits.data_ptr(),
        temperature=temperature.data_ptr(),
        peak=top.data_ptr(),
        seeds=seeds.data_ptr(),
        steps=steps.data_ptr(),
        score=score.data_ptr(),
        lse=lse.data_ptr(),
        ids=ids.data_ptr(),
        unit_sums=parts[0].data_ptr(),
        part_scores=parts[1].data_ptr(),
        part_columns=parts[2].data_ptr(),
        stride=logits.stride(0),
        offset=vocab_offset,
        rows=count,
        columns=columns,
        wide=is_aligned(logits),
        units=units,
    )
    code = _library().causeway_sample_partial(ctypes.byref(call), nvcc.stream(logits))
    nvcc.check_launch("sample_partial", code)
    return PartialSample(score=score, ids=ids, lse=lse)
