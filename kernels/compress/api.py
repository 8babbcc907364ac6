"""The compressor: entries pooled from the rows of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.index_query.api import check_index_dim
from kernels.kv_norm_rope.api import check_nope_blocks
from kernels.rope.api import check_inv_freq

_FLOATS = (torch.float32, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.float64)
SERIES = {4: 2, 128: 1}  # ratio -> groups of tokens an entry pools


def compress(
    rows: Tensor,
    row_index: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    *,
    ratio: int,
    index: bool,
    quantize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Pool token rows into entries: per-channel softmax of g over the rows, weighting u.

    Ratio 4 pools 8 rows of width w = 2d: slots 0..3 (the previous group) read columns [0:d) of u and
    g, slots 4..7 (the own group) columns [d:2d). Ratio 128 pools 128 rows of width w = d. Then: cast
    to ``dtype``, RMSNorm, RoPE at ``positions``, and with ``quantize`` FQ8(64) on the dims before the
    rotary ones (``index=False``) or Hadamard and FQ4(32) on all dims (``index=True``).

    Args:
        rows: float32 [N, 2 * w], u then ``g + ape[position mod ratio]`` of each token.
        row_index: int64 [E, 8] or [E, 128] into ``rows``; -1 = missing row (weight zero). An entry
            whose rows are all missing pools to zero.
        norm_weight: [d], float32 or bfloat16.
        positions: int64 [E], position of the first token of the own group.
        inv_freq: float32 [r/2].
        eps: RMSNorm epsilon.
        ratio: 4 or 128.
        index: an indexer key instead of a KV latent.
        quantize: apply the official rounding.
        dtype: dtype of the entries: float32, bfloat16 or float64. float64 here or in ``rows`` pools in
            float64.

    Returns:
        [E, d] in ``dtype``.

    Raises:
        KernelContractError: wrong shape, dtype, device or ratio; a row outside ``rows`` (checked on
            the CPU); dims that do not divide into rounding blocks.
    """
    if dtype not in _DTYPES:
        raise KernelContractError(f"compress: dtype {dtype}, allowed: float32, bfloat16, float64")
    dim = norm_weight.numel()
    check_pooled("compress", rows, row_index, norm_weight, positions, inv_freq, ratio, dim)
    check_entry_dims("compress", dim, inv_freq, index=index, quantize=quantize)
    result: Tensor = kernel("compress", rows.device)(
        rows,
        row_index,
        norm_weight,
        positions,
        inv_freq,
        eps,
        ratio=ratio,
        index=index,
        quantize=quantize,
        dtype=dtype,
    )
    return result


def check_ratio(op: str, ratio: int) -> None:
    """Check that entries can be pooled at this ratio.

    Raises:
        KernelContractError: they cannot.
    """
    if ratio not in SERIES:
        raise KernelContractError(f"{op}: ratio {ratio}, allowed: 4, 128")


def check_pooled(
    op: str,
    rows: Tensor,
    row_index: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    ratio: int,
    dim: int,
) -> None:
    """Check what entries of ``dim`` values are pooled, normed and rotated from.

    Raises:
        KernelContractError: see ``compress``.
    """
    check_ratio(op, ratio)
    series = SERIES[ratio]
    check_tensor(f"{op}: rows", rows, shape=(None, 2 * series * dim), dtype=torch.float32)
    for name, tensor, shape, dtype in (
        ("row_index", row_index, (None, series * ratio), torch.int64),
        ("norm_weight", norm_weight, (dim,), _FLOATS),
        ("positions", positions, (row_index.shape[0],), torch.int64),
    ):
        check_tensor(f"{op}: {name}", tensor, shape=shape, dtype=dtype, beside=rows)
    check_inv_freq(op, inv_freq, dim, rows)


def check_entry_dims(op: str, dim: int, inv_freq: Tensor, *, index: bool, quantize: bool) -> None:
    """Check that entries of ``dim`` values divide into the blocks they are rounded in.

    Raises:
        KernelContractError: they do not.
    """
    if index:
        check_index_dim(op, dim, quantize)
    else:
        check_nope_blocks(op, dim, inv_freq, quantize)
