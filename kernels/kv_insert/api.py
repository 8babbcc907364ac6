"""``kv_insert``: a token's KV latent made and put into its cache page in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.kv_norm_rope.api import check_nope_blocks
from kernels.page_cache.api import check_pool
from kernels.page_layout import EntryKind, PageLayout
from kernels.rope.api import check_rope_inputs

_FLOATS = (torch.float32, torch.bfloat16)


def kv_insert(
    kv: Tensor,
    weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    quantize: bool,
) -> Tensor:
    """``kv_norm_rope``, ``round_entries`` and ``store_entries`` in one.

    Args:
        kv: float32 or bfloat16 [T, d]; may be a column slice of a wider projection.
        weight: norm weight [d], float32 or bfloat16 (used in f32).
        positions: int64 [T].
        inv_freq: float32 [r/2]; 2 * len(inv_freq) is ``layout.rope_dim``.
        eps: RMSNorm epsilon.
        pool: uint8 [P, layout.page_bytes].
        layout: layout of latent entries with head_dim d.
        slots: int64 [T], each distinct or -1 (row made but not stored).
        quantize: apply the official FP8 rounding (blocks of 64).

    Returns:
        [T, d] in ``kv.dtype``: the rows as ``load_entries`` reads them back.

    Raises:
        KernelContractError: wrong shape, dtype, device or layout; a slot outside the pool (checked on
            the CPU).
    """
    check_tensor("kv_insert: kv", kv, shape=(None, None), dtype=_FLOATS)
    check_latent_insert(
        "kv_insert", kv, weight, positions, inv_freq, pool, layout, slots, quantize=quantize
    )
    out: Tensor = kernel("kv_insert", kv.device)(
        kv, weight, positions, inv_freq, eps, pool, layout, slots, quantize=quantize
    )
    return out


def check_latent_insert(
    op: str,
    kv: Tensor,
    weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    quantize: bool,
) -> None:
    """Check everything that goes with latents ``kv`` [T, d].

    Raises:
        KernelContractError: see ``kv_insert``.
    """
    check_tensor(f"{op}: weight", weight, shape=(kv.shape[1],), dtype=_FLOATS, beside=kv)
    check_rope_inputs(op, kv, positions, inv_freq)
    check_nope_blocks(op, kv.shape[1], inv_freq, quantize)
    rope_dim = 2 * inv_freq.numel()
    if layout.kind is not EntryKind.LATENT or layout.rope_dim != rope_dim:
        raise KernelContractError(
            f"{op}: layout: expected latent entries with {rope_dim} rotary dims, got"
            f" {layout.kind.value} entries with {layout.rope_dim}"
        )
    if layout.head_dim != kv.shape[1]:
        raise KernelContractError(
            f"{op}: layout: expected head_dim {kv.shape[1]}, got {layout.head_dim}"
        )
    check_pool(op, pool, layout, kv.device)
    check_tensor(f"{op}: slots", slots, shape=(kv.shape[0],), dtype=torch.int64, beside=kv)
