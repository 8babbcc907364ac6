"""The grouped output projection: inverse RoPE, ``wo_a`` per group, ``wo_b`` across groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import (
    PreparedWeight,
    block_amax,
    grouped_output,
    grouped_output_quant,
    linear,
    linear_quant,
    prepare_weight,
    wide_dtype,
)

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.deepseek_v4.projection import Projector
    from model.parallel.collectives import Group
    from model.parallel.mesh import ParallelMesh

_BLOCK = 128  # columns of a wo_b scale block, and of an activation scale


class AttentionOutput:
    """``wo_a`` and ``wo_b`` of one layer; decode uses views of the same tensors."""

    def __init__(
        self,
        config: DeepSeekV4Config,
        weights: WeightDict,
        attn: str,
        inv_freq: Tensor,
        mesh: ParallelMesh,
        projector: Projector,
    ) -> None:
        self.inv_freq, self.mesh, self.projector = inv_freq, mesh, projector
        self.rank_dim = config.o_lora_rank
        self.columns = config.o_groups * config.o_lora_rank  # of wo_b over all ranks
        self.view = mesh.decode_view(config.num_attention_heads, config.o_groups)
        self.groups = config.o_groups // mesh.tp.size
        self.first_group = mesh.coord.tp_rank * self.groups
        # Its product takes unrounded rows: the values are kept, not the checkpoint's FP8 form.
        self.wo_a = prepare_weight(weights.block(f"{attn}.wo_a.weight"), dequantize=True)
        self.wo_b = prepare_weight(weights.block(f"{attn}.wo_b.weight"))
        lo, hi = (g * self.rank_dim for g in self.view.groups)
        self.decode_wo_a = self.wo_a.rows(lo, hi)
        self.decode_wo_b = self.wo_b.cols(lo, hi)

    def prefill(self, o: Tensor, positions: Tensor) -> Tensor:
        """o [T, H/tp, d] -> [T, D], summed over tp: wide, or rounded by a rank alone."""
        return self._project(
            o, positions, self.wo_a, self.wo_b, self.first_group, self.groups, self.mesh.tp
        )

    def decode(self, o: Tensor, positions: Tensor) -> Tensor:
        """o [T, H of the decode slice, d] -> [T, D], summed over the decode group, as ``prefill``."""
        lo, hi = self.view.groups
        return self._project(
            o,
            positions,
            self.decode_wo_a,
            self.decode_wo_b,
            self.first_group + lo,
            hi - lo,
            self.view.group,
        )

    def _project(
        self,
        o: Tensor,
        positions: Tensor,
        wo_a: PreparedWeight,
        wo_b: PreparedWeight,
        first_group: int,
        groups: int,
        group: Group,
    ) -> Tensor:
        # Partial sums travel wide; who mixes them into the streams rounds them, once. A rank alone
        # rounds in the product.
        dtype = o.dtype if group.size == 1 else wide_dtype(o.dtype)
        start, columns = first_group * self.rank_dim, groups * self.rank_dim
        cuts_block = columns % _BLOCK != 0 and group.size > 1
        if (
            self.projector.fused
            and wo_b.kind.rounds_activations
            and start % _BLOCK == 0
            and not cuts_block
        ):
            rows = grouped_output_quant(o, positions, self.inv_freq, wo_a, groups)
            out = linear_quant(rows, wo_b, out_dtype=dtype)
        else:
            u = grouped_output(o, positions, self.inv_freq, wo_a, groups)
            amax = (
                self._shared_amax(u, start, group)
                if self.projector.quantize and cuts_block
                else None
            )
            out = linear(u, wo_b, quantize=self.projector.quantize, amax=amax, out_dtype=dtype)
        return group.all_reduce(out)

    def _shared_amax(self, u: Tensor, start: int, group: Group) -> Tensor:
        """Block maxima where a rank's columns cut a 128-block: the maximum over all its owners."""
        local = block_amax(u, _BLOCK, col_offset=start % _BLOCK)
        first, count = start // _BLOCK, local.shape[1]
        full = local.new_zeros(u.shape[0], -(-self.columns // _BLOCK))
        full[:, first : first + count] = local
        return group.all_reduce(full, "max")[:, first : first + count].contiguous()
