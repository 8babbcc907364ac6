"""Torch twin of ``compress_decode``: all rows into the rings, then the entries out of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.compress.api import SERIES
from kernels.compress_decode.api import CompressPart
from kernels.compress_insert.reference import compress_insert
from kernels.contract import KernelContractError


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
    """See ``kernels.compress_decode.api.compress_decode``."""
    live = state_base >= 0
    back = SERIES[ratio] * ratio
    if rows.device.type == "cpu":
        _check_order(positions[live], seq[live], state_base[live], back, ring_rows, state.shape[0])
    kept, place = [], positions % ratio
    column = 0
    for part in parts:
        u, g = rows[:, column : column + part.width].chunk(2, dim=1)
        kept += [u, g + part.ape.to(rows.dtype)[place]]
        column += part.width
    dest = state_base + positions % ring_rows
    state[dest[live]] = torch.cat(kept, dim=1)[live].to(state.dtype)
    ends = live & (place == ratio - 1)
    end, base = positions[ends] + 1, state_base[ends]
    pooled = end[:, None] - back + torch.arange(back, device=rows.device)
    index = (base[:, None] + pooled % ring_rows).masked_fill(pooled < 0, -1)
    column = 0
    for part in parts:
        compress_insert(
            state[:, column : column + part.width],
            index,
            part.norm_weight,
            end - ratio,
            inv_freq,
            eps,
            part.pool,
            part.layout,
            part.slots[ends],
            ratio=ratio,
            quantize=quantize,
            dtype=dtype,
        )
        column += part.width


def _check_order(
    positions: Tensor, seq: Tensor, base: Tensor, back: int, ring_rows: int, state_rows: int
) -> None:
    """Checks of values, on the CPU only: on a GPU the read-back would stall the stream."""
    if positions.numel() == 0:
        return
    if int(base.max()) + ring_rows > state_rows:
        raise KernelContractError(
            f"compress_decode: state_base {int(base.max())} and {ring_rows} ring rows are outside"
            f" the state's {state_rows} rows"
        )
    names, counts = torch.unique_consecutive(seq, return_counts=True)
    same = seq[1:] == seq[:-1]
    if names.unique().numel() != names.numel() or bool(
        (same & (positions[1:] != positions[:-1] + 1)).any()
    ):
        raise KernelContractError(
            "compress_decode: rows of a sequence must lie side by side, positions ascending by one"
        )
    if int(counts.max()) + back - 1 > ring_rows:
        raise KernelContractError(
            f"compress_decode: {int(counts.max())} rows of a sequence and entries of {back} rows"
            f" do not fit a ring of {ring_rows}"
        )
