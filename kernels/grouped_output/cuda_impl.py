"""CUDA C++ implementation: RoPE undone on the way into bf16 products of kernels/linear/cuda."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels import nvcc
from kernels.grouped_output import reference
from kernels.linear import product
from kernels.linear.api import PreparedWeight
from kernels.linear.device_weight import Fp8Weight
from kernels.quant_rows.api import (
    BLOCK,
    QuantRows,
    columns_argument,
    empty_quant_rows,
    quant_rows,
)

_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = (_FOLDER / "grouped.cu", _FOLDER / "grouped_shapes.h", *product.HEADERS)
_STEP = 64  # columns of K in a stage; the rotary columns of a head fill one
_LEAST_HEAD = (
    512  # columns; shorter heads would have more rotated stages in the ring than its slots
)
# Indices in cuda/grouped_shapes.h by rows. A cluster of eight blocks shares two tiles of 64 columns, one
# of four a tile of 128; the last tile's blocks walk all of K.
_EIGHT = {16: 0, 32: 1, 64: 2}
_FOUR = {16: 4, 32: 5, 64: 6, 128: 7}
_WHOLE = 8
TILES = 9
_EIGHTS = 28  # clusters of eight that an H200 holds at once


@functools.cache
def _library() -> ctypes.CDLL:
    library = nvcc.load_library(*_SOURCES)
    product.declare(library.causeway_grouped_output)
    return library


def build() -> None:
    """Compile now what a first call would compile."""
    _library()


def grouped_output(
    o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: PreparedWeight, num_groups: int
) -> Tensor:
    """See ``kernels.grouped_output.api.grouped_output``."""
    if not _serves(o, inv_freq, wo_a):
        return reference.grouped_output(o, positions, inv_freq, wo_a, num_groups)
    out = torch.empty(o.shape[0], wo_a.out_features, dtype=o.dtype, device=o.device)
    if out.numel():
        arguments = product.Arguments(
            out=out.data_ptr(), out_stride=out.stride(0), out_kind=product.OUT_KIND[out.dtype]
        )
        _start("grouped_output", o, positions, inv_freq, wo_a, num_groups, arguments)
    return out


def grouped_output_quant(
    o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: PreparedWeight, num_groups: int
) -> QuantRows:
    """See ``kernels.grouped_output.api.grouped_output_quant``.

    Groups whose columns are not whole scale blocks take two launches.
    """
    if not _serves(o, inv_freq, wo_a) or wo_a.out_features // num_groups % BLOCK:
        return quant_rows(grouped_output(o, positions, inv_freq, wo_a, num_groups))
    out = empty_quant_rows(o.shape[0], wo_a.out_features, o.device, for_pieces=True)
    if out.q.numel():
        columns, shift = columns_argument(out)
        arguments = product.Arguments(
            out=out.q.data_ptr(),
            out_stride=out.q.stride(0),
            scale=out.scale.data_ptr(),
            scale_stride=out.scale.stride(0),
            columns=columns,
            column_blocks=out.scale.shape[1],
            column_shift=shift,
            out_kind=product.OUT_KIND[out.q.dtype],
        )
        _start("grouped_output_quant", o, positions, inv_freq, wo_a, num_groups, arguments)
    return out


def _serves(o: Tensor, inv_freq: Tensor, wo_a: PreparedWeight) -> bool:
    weight: object = wo_a  # one of the classes that prepare_weight made
    narrow = isinstance(weight, Fp8Weight) or wo_a.matrix.dtype is torch.bfloat16
    rotary, dim = 2 * inv_freq.numel(), o.shape[2]
    fits = rotary == _STEP and dim % _STEP == 0 and dim >= _LEAST_HEAD
    return o.dtype is torch.bfloat16 and narrow and fits


def _start(
    op: str,
    o: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    wo_a: PreparedWeight,
    num_groups: int,
    arguments: product.Arguments,
    tile: int | None = None,
) -> None:
    """Fill in what the plain and the FP8 form share, and start the product."""
    tokens, heads, dim = o.shape
    columns = heads // num_groups * dim
    if heads > 1 and o.stride(1) != dim:
        o = o.contiguous()
    rows = product.aligned(o.flatten(1))
    # Prepared with `dequantize` this is the bf16 weight itself; else it is made anew at each call.
    matrix = wo_a.matrix
    weight = product.aligned(matrix.bfloat16())
    arguments.positions, arguments.inv_freq = positions.data_ptr(), inv_freq.data_ptr()
    arguments.rows, arguments.groups = tokens, num_groups
    arguments.n = wo_a.out_features // num_groups
    arguments.k_steps, arguments.segment_steps = product.k_steps(columns, _LEAST_HEAD // _STEP)
    arguments.head_steps = dim // _STEP
    arguments.weight_early = weight is matrix
    product.start(
        op,
        _library().causeway_grouped_output,
        choose(tokens, arguments.n, num_groups) if tile is None else tile,
        rows[:, :columns],
        columns,
        weight,
        arguments,
    )


def choose(tokens: int, columns: int, groups: int) -> int:
    """Index of the tile that was measured to be fastest; every choice gives the same bits."""
    wide = groups * -(-columns // 128)
    if -(-tokens // 128) * wide >= (128 if tokens <= 16 else 64):
        return _WHOLE
    height = next((rows for rows in _EIGHT if tokens <= rows), 128)
    if height == 128 and -(-tokens // 64) * wide <= 16:
        height = 64
    few = height in _EIGHT and -(-tokens // height) * wide <= _EIGHTS
    return (_EIGHT if few else _FOUR)[height]
