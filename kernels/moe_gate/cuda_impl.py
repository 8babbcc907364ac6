"""The router in CUDA C++ for bf16 rows and weight; float32 takes the Triton kernels of this folder.

Up to ``_FEW`` tokens one launch does everything, above the product of ``kernels.linear`` makes logits and a
second launch chooses. The sums are the same, bit by bit. Blocks of the one launch wait for each other's
words in a workspace of the device: two such launches must not overlap, so this op belongs to one stream of a
device. The weight must not be written by the kernel directly ahead in the stream, which may still run when it
is read. The first call on a device allocates and compiles; make it before a graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kernels import nvcc
from kernels.linear import product
from kernels.moe_gate import reference
from kernels.moe_gate.triton_impl import moe_gate as triton_moe_gate
from kernels.triton_math import twin_for_float64

_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = (_FOLDER / "gate.cu", _FOLDER / "choose.cuh", *product.HEADERS)
_FEW = 64  # tokens up to which one launch runs
_EXPERTS, _MOST_EXPERTS = 16, 512  # of a block; in all
_MOST_CHOICES = 32  # lanes of a warp
_SEGMENTS = 4  # of the product's columns


class _Arguments(ctypes.Structure):
    """``Arguments`` of cuda/choose.cuh, field by field."""

    _fields_: ClassVar = [
        ("logits", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("experts", ctypes.c_int),
        ("k", ctypes.c_int),
        ("table_is_wide", ctypes.c_int),
        ("pitch", ctypes.c_int),
        ("route_scale", ctypes.c_float),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(*_SOURCES)
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    gate = ctypes.POINTER(_Arguments)
    library.causeway_moe_gate_few.argtypes = (
        *(pointer, wide, pointer, wide, wide),
        *(ctypes.POINTER(product.Arguments), gate, pointer),
    )
    library.causeway_moe_gate_choose.argtypes = (gate, pointer)
    return library


def build() -> None:
    """Compile what this module runs (at start, before the first request)."""
    _library()
    product.build()


@functools.cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tagged words of the sums, and the counter that their tags come from."""
    words = torch.zeros(_FEW * _SEGMENTS * _MOST_EXPERTS, dtype=torch.int64, device=device)
    return words, torch.zeros(1, dtype=torch.int64, device=device)


def _serves(x: Tensor, weight: Tensor, k: int) -> bool:
    narrow = x.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16
    return narrow and x.shape[1] > 0 and weight.shape[0] <= _MOST_EXPERTS and k <= _MOST_CHOICES


@twin_for_float64(reference.moe_gate)
def moe_gate(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    route_scale: float,
    bias: Tensor | None = None,
    tid2eid: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.moe_gate.api.moe_gate``.

    A token or expert id outside its table is not an error here, which would need a host sync: the
    row's weights are NaN.
    """
    if not _serves(x, weight, k):
        return triton_moe_gate(
            x,
            weight,
            k=k,
            route_scale=route_scale,
            bias=bias,
            tid2eid=tid2eid,
            token_ids=token_ids,
        )
    tokens, experts = x.shape[0], weight.shape[0]
    ids = torch.empty((tokens, k), dtype=torch.int64, device=x.device)
    weights = torch.empty((tokens, k), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return ids, weights
    # Copies live until the launch is in the stream. The bias is read 16 bytes at a time.
    if bias is not None and not (bias.is_contiguous() and bias.data_ptr() % 16 == 0):
        bias = bias.clone(memory_format=torch.contiguous_format)
    token_ids = None if token_ids is None else token_ids.contiguous()
    table = None if tid2eid is None else tid2eid if tid2eid.stride(1) == 1 else tid2eid.contiguous()
    arguments = _Arguments(
        bias=nvcc.pointer(bias),
        table=nvcc.pointer(table),
        token_ids=nvcc.pointer(token_ids),
        ids=ids.data_ptr(),
        weights=weights.data_ptr(),
        table_stride=0 if table is None else table.stride(0),
        vocab=0 if table is None else table.shape[0],
        tokens=tokens,
        experts=experts,
        k=k,
        table_is_wide=table is not None and table.dtype is torch.int64,
        pitch=-(-experts // _EXPERTS) * _EXPERTS,
        route_scale=route_scale,
    )
    if tokens <= _FEW:
        _few(x, weight, arguments)
        return ids, weights
    logits = product.product(x, weight, torch.float32)
    arguments.logits = logits.data_ptr()
    code = _library().causeway_moe_gate_choose(ctypes.byref(arguments), nvcc.stream(x))
    nvcc.check_launch("moe_gate", code)
    return ids, weights


def _few(x: Tensor, weight: Tensor, arguments: _Arguments) -> None:
    (tokens, dim), experts = x.shape, weight.shape[0]
    words, counter = _workspace(x.device)
    arguments.words, arguments.counter = words.data_ptr(), counter.data_ptr()
    left, right = product.aligned(x), product.aligned(weight)
    steps, segment = product.k_steps(dim)
    sums = product.Arguments(
        rows=tokens,
        n=experts,
        groups=1,
        k_steps=steps,
        segment_steps=segment,
        head_steps=1,
        weight_early=right is weight,
    )
    code = _library().causeway_moe_gate_few(
        left.data_ptr(),
        product.stride_bytes(left.stride(0), tokens, dim),
        right.data_ptr(),
        product.stride_bytes(right.stride(0), experts, dim),
        dim,
        ctypes.byref(sums),
        ctypes.byref(arguments),
        nvcc.stream(x),
    )
    nvcc.check_launch("moe_gate", code)
