"""``qkv_norm_rope``: query heads, KV latent and indexer query of a layer in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import check_tensor
from kernels.dispatch import kernel
from kernels.index_query.api import check_index_dim
from kernels.kv_insert.api import check_latent_insert
from kernels.page_layout import PageLayout
from kernels.rope.api import check_inv_freq

_FLOATS = (torch.float32, torch.bfloat16)


def qkv_norm_rope(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    pool: Tensor,
    layout: PageLayout,
    slots: Tensor,
    *,
    quantize: bool,
    index_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``q_norm_rope(q)``, ``kv_insert(kv)`` and ``index_query(index_q)`` of the same tokens.

    Args:
        q: float32 or bfloat16 [T, H, d]; may be a view of columns of a wider product.
        kv: [T, d] in q.dtype; may be a column slice.
        kv_weight: norm weight [d], float32 or bfloat16.
        positions: int64 [T].
        inv_freq: float32 [r/2]; 2 * len(inv_freq) is ``layout.rope_dim``.
        eps: of both norms.
        pool: uint8 [P, layout.page_bytes].
        layout: layout of latent entries with head_dim d.
        slots: int64 [T], where each latent is stored; each distinct or -1 (made but not stored).
        quantize: take the official rounding steps.
        index_q: the indexer's heads [T, h, di] in q.dtype, or None.

    Returns:
        Query heads [T, H, d], latents [T, d] as ``load_entries`` reads them back, and the indexer's
        heads [T, h, di] or None; all contiguous.

    Raises:
        KernelContractError: wrong shape, dtype, device or layout; a slot outside the pool (checked on
            the CPU).
    """
    check_tensor("qkv_norm_rope: q", q, shape=(None, None, None), dtype=_FLOATS)
    tokens, _, dim = q.shape
    check_tensor("qkv_norm_rope: kv", kv, shape=(tokens, dim), dtype=q.dtype, beside=q)
    check_latent_insert(
        "qkv_norm_rope", kv, kv_weight, positions, inv_freq, pool, layout, slots, quantize=quantize
    )
    if index_q is not None:
        check_tensor(
            "qkv_norm_rope: index_q",
            index_q,
            shape=(tokens, None, None),
            dtype=q.dtype,
            beside=q,
        )
        check_index_dim("qkv_norm_rope", index_q.shape[-1], quantize)
        check_inv_freq("qkv_norm_rope: index_q", inv_freq, index_q.shape[-1], q)
    out: tuple[Tensor, Tensor, Tensor | None] = kernel("qkv_norm_rope", q.device)(
        q,
        kv,
        kv_weight,
        positions,
        inv_freq,
        eps,
        pool,
        layout,
        slots,
        quantize=quantize,
        index_q=index_q,
    )
    return out
