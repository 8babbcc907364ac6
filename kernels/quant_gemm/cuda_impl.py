"""CUDA C++ implementation on Hopper's tensor cores: see the files of cuda/."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.grouped_gemm.api import PreparedExperts
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.linear.api import BLOCK, PreparedWeight
from kernels.linear.device_weight import Fp8Weight
from kernels.quant_gemm import cuda_launch, reference, tuning
from kernels.quant_gemm.cuda_launch import expand_fp4
from kernels.quant_rows.api import QuantRows, empty_quant_rows, swiglu_quant

_ALIGN = 16  # bytes between rows that the copy engine asks for


def build() -> None:
    """Compile now what a first call would compile."""
    cuda_launch.library()


def linear_quant(rows: QuantRows, w: PreparedWeight, *, out_dtype: torch.dtype) -> Tensor:
    """See ``kernels.quant_gemm.api.linear_quant``."""
    weight: object = w  # one of the classes that prepare_weight made
    if not isinstance(weight, Fp8Weight):
        return reference.linear_quant(rows, w, out_dtype=out_dtype)
    out = torch.empty(rows.shape[0], w.out_features, dtype=out_dtype, device=rows.device)
    if out.numel() == 0:
        return out
    if w.in_features == 0:
        return out.zero_()
    processors = cuda_launch.multiprocessors(rows.device.index)
    tile = tuning.choose(out.shape[0], out.shape[1], weight.scale.shape[1], processors)
    multiply(tile, rows, weight, out)
    return out


def linear_swiglu_quant(
    rows: QuantRows, w: PreparedWeight, *, limit: float, hidden_dtype: torch.dtype
) -> QuantRows:
    """See ``kernels.quant_gemm.api.linear_swiglu_quant``.

    Few tiles leave most of the machine idle: then two launches are faster, with the same bits.
    """
    weight: object = w
    width = w.out_features // 2
    processors = cuda_launch.multiprocessors(rows.device.index)
    if (
        isinstance(weight, Fp8Weight)
        and hidden_dtype == torch.bfloat16
        and width % BLOCK == 0
        and weight.in_features
        and not (weight.row_offset or _is_odd(weight))
        and tuning.gated_fills(rows.shape[0], width, processors)
    ):
        return multiply_gated(tuning.GATED[128], rows, weight, limit=limit)
    both = linear_quant(rows, w, out_dtype=hidden_dtype)
    return swiglu_quant(both[:, :width], both[:, width:], limit=limit)


def multiply(tile: tuning.Tile, rows: QuantRows, w: Fp8Weight, out: Tensor) -> None:
    """One weight, with the tile named; ``out`` has a row for each of ``rows``."""
    data = w.data
    if _is_odd(w):  # the copy engine starts at multiples of 16 bytes only
        data, rows = _from_block_start(data, w.col_offset), _rows_from_block_start(rows)
    scale = w.scale.unsqueeze(0)
    cuda_launch.product(tile, rows, data.unsqueeze(0), scale, out, None, row_offset=w.row_offset)


def multiply_gated(tile: tuning.Tile, rows: QuantRows, w: Fp8Weight, *, limit: float) -> QuantRows:
    """One weight whose halves of whole blocks are gate and up, with the tile named."""
    width = w.out_features // 2
    out = empty_quant_rows(rows.shape[0], width, rows.device, for_pieces=True)
    data, scale = w.data.unsqueeze(0), w.scale.unsqueeze(0)
    cuda_launch.gated_product(
        tile, rows, data, scale, out, None, up_row=width, row_weight=None, limit=limit
    )
    return out


def multiply_grouped(
    tile: tuning.Tile,
    rows: QuantRows,
    data: Tensor,
    scale: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    offsets_are_old: bool = False,
) -> None:
    """``out[offsets[g] : offsets[g + 1]] = rows[same] data[g]^T`` for every group.

    ``offsets_are_old``: the kernel directly ahead in the stream writes neither them nor ``data``, so
    that the weights may be read before it has ended.
    """
    cuda_launch.product(
        tile, rows, data, scale, out, offsets, row_offset=0, offsets_are_old=offsets_are_old
    )


def expert_ffn_quant(
    rows: QuantRows,
    offsets: Tensor,
    row_weight: Tensor,
    experts: PreparedExperts,
    *,
    limit: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See ``kernels.quant_gemm.api.expert_ffn_quant``.

    Rows beyond ``offsets[-1]`` are in no tile: neither read nor written. Only where SwiGLU is a launch
    of its own (float32, or few rows) does it walk them too; a row's values stay its own.
    """
    if not isinstance(experts, Fp8Experts | Fp4Experts):
        return reference.expert_ffn_quant(
            rows, offsets, row_weight, experts, limit=limit, out_dtype=out_dtype
        )
    count = rows.shape[0]
    out = torch.empty(count, experts.hidden_size, dtype=out_dtype, device=rows.device)
    if out.numel() == 0:
        return out
    inner = _first_product(rows, offsets, row_weight, experts, limit=limit, dtype=out_dtype)
    # The first product lies between these offsets and the second.
    if isinstance(experts, Fp4Experts):
        packed, sub = experts.w2_data, experts.w2_sub
        multiply_packed(inner, packed, sub, experts.w2_scale, offsets, out, offsets_are_old=True)
    else:
        data, scale = experts.w2_data, experts.w2_scale
        tile = tuning.choose_grouped(count, experts.num_experts)
        multiply_grouped(tile, inner, data, scale, offsets, out, offsets_are_old=True)
    return out


def multiply_packed(
    rows: QuantRows,
    packed: Tensor,
    sub: Tensor,
    scale: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    offsets_are_old: bool = False,
) -> None:
    """``multiply_grouped`` of packed FP4 weights, read as they are or expanded: the same bits."""
    count, groups = rows.shape[0], packed.shape[0]
    tile = _packed_tile(rows, groups)
    if tile is not None:
        cuda_launch.packed_product(
            tile, rows, packed, sub, scale, out, offsets, offsets_are_old=offsets_are_old
        )
        return
    data = expand_fp4(packed, sub, scale, offsets)  # directly ahead of the product
    multiply_grouped(tuning.choose_grouped(count, groups), rows, data, scale, offsets, out)


def _packed_tile(rows: QuantRows, groups: int) -> tuning.PackedTile | None:
    """The tile that reads packed weights; None where they are expanded."""
    return None if rows.col_offset else tuning.choose_packed(rows.shape[0], groups, rows.shape[1])


def _first_product(
    rows: QuantRows,
    offsets: Tensor,
    row_weight: Tensor,
    experts: Fp8Experts | Fp4Experts,
    *,
    limit: float,
    dtype: torch.dtype,
) -> QuantRows:
    """The experts' hidden rows, SwiGLU included."""
    count, width, up = rows.shape[0], experts.intermediate_size, experts.up_row
    groups, w13, scale = experts.num_experts, experts.w13, experts.w13_scale
    gated = tuning.choose_gated(count, groups) if dtype == torch.bfloat16 else None
    direct = isinstance(experts, Fp4Experts) and _packed_tile(rows, groups) is not None
    if gated is None or direct:
        hidden = torch.empty(count, w13.shape[1], dtype=dtype, device=rows.device)
        if isinstance(experts, Fp4Experts):
            multiply_packed(rows, w13, experts.w13_sub, scale, offsets, hidden)
        else:
            tile = tuning.choose_grouped(count, groups)
            multiply_grouped(tile, rows, w13, scale, offsets, hidden)
        return swiglu_quant(
            hidden[:, :width], hidden[:, up : up + width], limit=limit, row_weight=row_weight
        )
    if isinstance(experts, Fp4Experts):
        w13 = expand_fp4(w13, experts.w13_sub, scale, offsets)
    inner = empty_quant_rows(count, width, rows.device)
    cuda_launch.gated_product(
        gated, rows, w13, scale, inner, offsets, up_row=up, row_weight=row_weight, limit=limit
    )
    return inner


def _is_odd(w: Fp8Weight) -> bool:
    """Whether the weight is a slice that the copy engine cannot walk."""
    start, column = w.data.data_ptr(), w.col_offset
    return bool(w.data.stride(0) % _ALIGN or start % _ALIGN or column % _ALIGN)


def _from_block_start(data: Tensor, lead: int) -> Tensor:
    """A copy of e4m3 rows that begins ``lead`` zero columns earlier, rows at multiples of 16."""
    copy = empty_quant_rows(data.shape[0], lead + data.shape[1], data.device).q
    copy.view(torch.uint8)[:, :lead] = 0
    copy[:, lead:] = data
    return copy


def _rows_from_block_start(rows: QuantRows) -> QuantRows:
    q = _from_block_start(rows.q, rows.col_offset)
    return QuantRows(q=q, scale=rows.scale, col_offset=0)
