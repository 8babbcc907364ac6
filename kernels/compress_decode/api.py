"""``compress_decode``: keep the compressor rows of a decode step, store the entries they complete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.compress.api import SERIES, check_entry_dims, check_ratio
from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.page_cache.api import check_pool
from kernels.page_layout import EntryKind, PageLayout
from kernels.rope.api import check_inv_freq

_FLOATS = (torch.float32, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressPart:
    """One compressor of a layer: the main one, or the indexer's.

    Args:
        ape: float32 [ratio, w]; w is ``layout.head_dim`` for ratio 128, twice that for ratio 4.
        norm_weight: [d], float32 or bfloat16.
        pool: uint8 [P, layout.page_bytes].
        layout: entries of d values; index entries make this the indexer's compressor.
        slots: int64 [T], page slot of the entry that each row would complete; -1: not kept here.
            Not read where a row completes none.
    """

    ape: Tensor
    norm_weight: Tensor
    pool: Tensor
    layout: PageLayout
    slots: Tensor

    @property
    def index(self) -> bool:
        """Whether entries are indexer keys (Hadamard and FP4 instead of FP8 rounding)."""
        return self.layout.kind is EntryKind.INDEX

    @property
    def width(self) -> int:
        """Columns of this part in rows and state: u and g."""
        return 2 * self.ape.shape[1]


def compress_decode(
    rows: Tensor,
    state: Tensor,
    parts: tuple[CompressPart, ...],
    positions: Tensor,
    seq: Tensor,
    state_base: Tensor,
    *,
    ratio: int,
    ring_rows: int,
    inv_freq: Tensor,
    eps: float,
    quantize: bool,
    dtype: torch.dtype,
) -> None:
    """For every row t with ``state_base[t] >= 0``: keep it, and store the entry it completes, if any.

    The row ``(u, g + ape[position % ratio])`` goes to ``state[state_base + position % ring_rows]``.
    Where ``(position + 1) % ratio == 0`` the group that ends here is pooled (``compress``: 8 rows for
    ratio 4, 128 for ratio 128; rows before position 0 are missing), normed, rotated, rounded and
    stored at ``slots[t]`` of its part. Rows of the step are seen by later rows of their sequence.

    Args:
        rows: float32 [T, W]: products ``[u | g]`` of every part side by side, in the order of
            ``parts``; may be a column slice of a wider product.
        state: float32 [N, W], the ring rows of all slots.
        parts: the layer's compressors.
        positions: int64 [T].
        seq: int64 [T]. Rows of one sequence lie side by side with consecutive ascending positions;
            padding comes after them.
        state_base: int64 [T], first ring row of the sequence; -1 = padding, nothing is done.
        ratio: 4 or 128.
        ring_rows: rows of a ring. A ring holds at least what one entry pools plus the rows of a
            sequence in the step minus one.
        inv_freq: float32 [r/2].
        eps: RMSNorm epsilon.
        quantize: take the official rounding steps.
        dtype: compute dtype of entries: float32, bfloat16 or float64 (which pools in float64).

    Raises:
        KernelContractError: wrong shape, dtype, device, ratio or layout; on the CPU also a slot or
            ring row outside its tensor, rows out of order, or a ring that is too short.
    """
    check_ratio("compress_decode", ratio)
    if dtype not in _DTYPES:
        raise KernelContractError(
            f"compress_decode: dtype {dtype}, allowed: float32, bfloat16, float64"
        )
    if not parts:
        raise KernelContractError("compress_decode: parts: expected one or more, got none")
    if ring_rows < SERIES[ratio] * ratio:
        raise KernelContractError(
            f"compress_decode: ring_rows: {ring_rows}, but an entry pools {SERIES[ratio] * ratio}"
        )
    width = sum(part.width for part in parts)
    check_tensor("compress_decode: rows", rows, shape=(None, width), dtype=torch.float32)
    if state.dtype is not torch.float32:
        raise KernelContractError(f"compress_decode: state: expected float32, got {state.dtype}")
    check_tensor("compress_decode: state", state, shape=(None, width), beside=rows)
    count = (rows.shape[0],)
    for name, value in (("positions", positions), ("seq", seq), ("state_base", state_base)):
        check_tensor(f"compress_decode: {name}", value, shape=count, dtype=torch.int64, beside=rows)
    for part in parts:
        _check_part(part, rows, inv_freq, ratio=ratio, quantize=quantize)
    kernel("compress_decode", rows.device)(
        rows,
        state,
        parts,
        positions,
        seq,
        state_base,
        ratio=ratio,
        ring_rows=ring_rows,
        inv_freq=inv_freq,
        eps=eps,
        quantize=quantize,
        dtype=dtype,
    )


def _check_part(
    part: CompressPart,
    rows: Tensor,
    inv_freq: Tensor,
    *,
    ratio: int,
    quantize: bool,
) -> None:
    op, dim = "compress_decode", part.layout.head_dim
    for name, tensor, shape, dtype in (
        ("ape", part.ape, (ratio, SERIES[ratio] * dim), torch.float32),
        ("norm_weight", part.norm_weight, (dim,), _FLOATS),
        ("slots", part.slots, (rows.shape[0],), torch.int64),
    ):
        check_tensor(f"{op}: {name}", tensor, shape=shape, dtype=dtype, beside=rows)
    check_pool(op, part.pool, part.layout, rows.device)
    check_inv_freq(op, inv_freq, dim, rows)
    check_entry_dims(op, dim, inv_freq, index=part.index, quantize=quantize)
