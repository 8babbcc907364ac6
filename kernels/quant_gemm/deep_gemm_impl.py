"""``linear_quant`` by DeepGEMM (package ``sgl-deep-gemm``) where it was measured to be faster.

That is: bf16 results of many rows, for whole weights of the shapes in ``pieces.FASTER``, of rows whose
maker wrote their float32 scales. They go through in pieces of the listed heights; what is left over,
and everything else, is the own kernel's. Both give the same bits (tested): per 128 columns of K one sum
of the tensor cores, scaled, added in float32 in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import deep_gemm
import torch
from torch import Tensor

from kernels.backend import DEEP_GEMM
from kernels.linear.api import PreparedWeight
from kernels.linear.device_weight import Fp8Weight
from kernels.quant_gemm import cuda_impl, cuda_launch, tuning
from kernels.quant_gemm.pieces import FASTER
from kernels.quant_rows.api import QuantRows


def build() -> None:
    """Compile what ``linear_quant`` runs: the own kernels, DeepGEMM's tile shapes."""
    cuda_impl.build()
    device = torch.device("cuda", torch.cuda.current_device())
    for (n, k), heights in FASTER.items():
        data = torch.zeros(n, k, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.ones(n // 128, k // 128, device=device)
        for height in heights:
            q = torch.zeros(height, k, dtype=torch.float8_e4m3fn, device=device)
            columns = torch.ones(k // 128, height, device=device)
            out = torch.empty(height, n, dtype=torch.bfloat16, device=device)
            multiply(q, columns, data, scale, out)
    torch.cuda.synchronize(device)


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.quant_gemm.api.linear_quant``."""
    weight: object = w  # one of the classes that prepare_weight made
    if not isinstance(weight, Fp8Weight) or not serves(rows, weight, out_dtype):
        return cuda_impl.linear_quant(rows, w, out_dtype=out_dtype)
    columns, scale = cast("tuple[Tensor, Tensor]", (rows.scale_columns, weight.float_scale))
    count, height = rows.shape[0], columns.shape[2]
    out = torch.empty(count, weight.out_features, dtype=out_dtype, device=rows.device)
    for piece in range(count // height):
        part = slice(piece * height, (piece + 1) * height)
        multiply(rows.q[part], columns[piece], weight.data, scale, out[part])
    done = count - count % height
    if done < count:
        rest = QuantRows(q=rows.q[done:], scale=rows.scale[done:])
        processors = cuda_launch.multiprocessors(rows.device.index)
        width, blocks = weight.out_features, weight.scale.shape[1]
        tile = tuning.choose(count - done, width, blocks, processors)
        cuda_impl.multiply(tile, rest, weight, out[done:])
    return out


def serves(rows: QuantRows, w: Fp8Weight, out_dtype: torch.dtype) -> bool:
    """Whether DeepGEMM multiplies pieces of these rows."""
    if rows.scale_columns is None or w.float_scale is None or out_dtype != torch.bfloat16:
        return False
    return rows.scale_columns.shape[2] in FASTER[w.out_features, w.in_features]


def multiply(q: Tensor, columns: Tensor, data: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out = rows data^T`` by DeepGEMM.

    Args:
        q: e4m3 codes of a piece [height, k].
        columns: their float32 scales [k / 128, height], without gaps: others it would copy.
        data: e4m3 weight [n, k].
        scale: float32 scales of its 128x128 blocks.
        out: bf16 [height, n].
    """
    with DEEP_GEMM.named("fp8_gemm_nt"), _early_start():
        deep_gemm.fp8_gemm_nt(
            (q, columns.t()),
            (data, scale),
            out,
            compiled_dims="nk",  # n and k constants of the kernel: 1 to 8 % faster than its default
            disable_ue8m0_cast=True,
        )


@contextmanager
def _early_start() -> Iterator[None]:
    """DeepGEMM's kernel may start while the one ahead ends; it waits for that one's results itself."""
    before = deep_gemm.get_pdl()
    deep_gemm.set_pdl(True)
    try:
        yield
    finally:
        deep_gemm.set_pdl(before)
