"""``kv_norm_rope``: the shared KV latent of a token, ready for the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.page_layout import QUANT_BLOCK
from kernels.rope.api import check_rope_inputs


def kv_norm_rope(
    kv: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, *, quantize: bool
) -> Tensor:
    """RMSNorm, RoPE on the last ``r = 2 * len(inv_freq)`` dims, FQ8(64) on the first ``d - r``.

    Args:
        kv: float32 or bfloat16 [T, d]; may be a column slice of a wider projection.
        weight: norm weight [d], float32 or bfloat16 (used in f32).
        positions: int64 [T].
        inv_freq: float32 [r/2].
        eps: RMSNorm epsilon.
        quantize: apply the official FP8 rounding (blocks of 64).

    Returns:
        A new, contiguous [T, d] in ``kv.dtype``.

    Raises:
        KernelContractError: wrong shape, dtype or device; with ``quantize``, d - r not a multiple of 64.
    """
    check_tensor("kv_norm_rope: kv", kv, shape=(None, None), dtype=(torch.float32, torch.bfloat16))
    check_tensor(
        "kv_norm_rope: weight",
        weight,
        shape=(kv.shape[1],),
        dtype=(torch.float32, torch.bfloat16),
        beside=kv,
    )
    check_rope_inputs("kv_norm_rope", kv, positions, inv_freq)
    check_nope_blocks("kv_norm_rope", kv.shape[1], inv_freq, quantize)
    result: Tensor = kernel("kv_norm_rope", kv.device)(
        kv, weight, positions, inv_freq, eps, quantize=quantize
    )
    return result


def check_nope_blocks(op: str, head_dim: int, inv_freq: Tensor, quantize: bool) -> None:
    """Check that the dims before the rotary ones divide into FP8 blocks when they are rounded.

    Raises:
        KernelContractError: they do not.
    """
    nope = head_dim - 2 * inv_freq.numel()
    if quantize and nope % QUANT_BLOCK:
        raise KernelContractError(
            f"{op}: {head_dim} dims minus {2 * inv_freq.numel()} rotary ones leave {nope},"
            f" which must be a multiple of {QUANT_BLOCK} (FP8 blocks)"
        )
