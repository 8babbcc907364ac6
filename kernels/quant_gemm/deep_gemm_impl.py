"""``linear_quant`` by DeepGEMM (package ``sgl-deep-gemm``) where it was measured to be faster.

That is: bf16 results of many rows, for whole weights of the shapes in ``FASTER``. Rows go through in
pieces of the listed heights, so that every kernel the package compiles is compiled by ``build``;
what is left over, and everything else, is the own kernel's. Both give the same bits (tested): per 128
columns of K one sum of the tensor cores, scaled, added in float32 in ascending order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deep_gemm
import torch
from torch import Tensor

from kernels.backend import DEEP_GEMM
from kernels.linear.api import PreparedWeight
from kernels.linear.device_weight import Fp8Weight
from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.quant_gemm import cuda_impl, cuda_launch, tuning
from kernels.quant_rows.api import QuantRows, empty_quant_rows

_SOURCE = Path(__file__).parent / "deep_gemm" / "scales.cu"
_ALIGN = 4  # rows of scales: DeepGEMM's columns of scales start at multiples of 16 bytes

# (n, k) of a weight -> heights of pieces, tallest first, at which DeepGEMM with the pass over the scales
# was faster than the own kernel on an H200 (2026-11-20: 0.6 to 6 %). Heights not listed are not, or slower.
FASTER: dict[tuple[int, int], tuple[int, ...]] = {
    (4096, 8192): (4096, 2048),  # Flash: wo_b
    (4096, 4096): (4096,),  # shared w1 and w3
    (2048, 7168): (4096,),  # Pro: wq_a and wkv
    (7168, 16384): (4096,),  # wo_b
    (7168, 3072): (4096,),  # shared w2
}


def build() -> None:
    """Compile what ``linear_quant`` runs: the own kernels, the scales, DeepGEMM's tile shapes."""
    cuda_impl.build()
    load_library(_SOURCE)
    device = torch.device("cuda", torch.cuda.current_device())
    for (n, k), heights in FASTER.items():
        data = torch.zeros(n, k, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.full((n // 128, k // 128), 127, dtype=torch.uint8, device=device)
        for height in heights:
            rows = empty_quant_rows(height, k, device)
            rows.q.view(torch.uint8).zero_()
            rows.scale.fill_(127)
            out = torch.empty(height, n, dtype=torch.bfloat16, device=device)
            multiply(rows, data, scale, out)
    torch.cuda.synchronize(device)


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.quant_gemm.api.linear_quant``."""
    weight: object = w  # one of the classes that prepare_weight made
    if not isinstance(weight, Fp8Weight) or not _served(weight, out_dtype):
        return cuda_impl.linear_quant(rows, w, out_dtype=out_dtype)
    heights = FASTER[weight.out_features, weight.in_features]
    count = rows.shape[0]
    if count < heights[-1]:
        return cuda_impl.linear_quant(rows, w, out_dtype=out_dtype)
    out = torch.empty(count, weight.out_features, dtype=out_dtype, device=rows.device)
    done = 0
    for height in _pieces(count, heights):
        part = slice(done, done + height)
        piece = QuantRows(q=rows.q[part], scale=rows.scale[part], col_offset=rows.col_offset)
        multiply(piece, weight.data, weight.scale, out[part])
        done += height
    if done < count:
        rest = QuantRows(q=rows.q[done:], scale=rows.scale[done:], col_offset=rows.col_offset)
        processors = cuda_launch.multiprocessors(rows.device.index)
        columns, blocks = weight.out_features, weight.scale.shape[1]
        tile = tuning.choose(count - done, columns, blocks, processors)
        cuda_impl.multiply(tile, rest, weight, out[done:])
    return out


def multiply(rows: QuantRows, data: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out = rows data^T`` by DeepGEMM; ``scale`` are the E8M0 bytes of the weight's blocks."""
    count, blocks = rows.scale.shape
    stride = -(-count // _ALIGN) * _ALIGN
    row_scale = torch.empty(blocks, stride, dtype=torch.float32, device=out.device)
    weight_scale = torch.empty(scale.shape, dtype=torch.float32, device=out.device)
    code = _library().causeway_scales_to_float(
        pointer(rows.scale),
        rows.scale.stride(0),
        count,
        blocks,
        pointer(row_scale),
        stride,
        pointer(scale),
        scale.numel(),
        pointer(weight_scale),
        stream(out),
    )
    check_launch("linear_quant: scales", code)
    with DEEP_GEMM.named("fp8_gemm_nt"), _early_start():
        deep_gemm.fp8_gemm_nt(
            (rows.q, row_scale.t()[:count]), (data, weight_scale), out, disable_ue8m0_cast=True
        )


@contextmanager
def _early_start() -> Iterator[None]:
    """DeepGEMM's kernel may start while the scales are made; it waits for them itself."""
    before = deep_gemm.get_pdl()
    deep_gemm.set_pdl(True)
    try:
        yield
    finally:
        deep_gemm.set_pdl(before)


def _served(w: Fp8Weight, out_dtype: torch.dtype) -> bool:
    return (
        out_dtype == torch.bfloat16
        and (w.out_features, w.in_features) in FASTER
        and w.row_offset == w.col_offset == 0
        and w.data.is_contiguous()
        and w.scale.is_contiguous()
    )


def _pieces(count: int, heights: tuple[int, ...]) -> Iterator[int]:
    """Heights that together take as many of ``count`` rows as they can, tallest first."""
    for height in heights:
        for _ in range(count // height):
            yield height
        count %= height


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_library(_SOURCE)
    address, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.causeway_scales_to_float.argtypes = (
        *(address, wide, number, number, address, wide),
        *(address, wide, address, address),
    )
    return library
