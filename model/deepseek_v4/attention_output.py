"""The grouped output projection: inverse RoPE, ``wo_a`` per group, ``wo_b`` across groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import (
    PreparedWeight,
    block_amax,
    grouped_output,
    linear,
    prepare_weight,
    wide_dtype,
)

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
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
        quantize: bool,
    ) -> None:
        self.inv_freq, self.quantize, self.mesh = inv_freq, quantize, mesh
        self.rank_dim = config.o_lora_rank
        self.columns = config.o_groups * config.o_lora_rank  # of wo_b over all ranks
        self.view = mesh.decode_view(config.num_attention_heads, config.o_groups)
        self.groups = config.o_groups // mesh.tp.size
        self.first_group = mesh.coord.tp_rank * self.groups
        self.wo_a = prepare_weight(weights.block(f"{attn}.wo_a.weight"))
        self.wo_b = prepare_weight(weights.block(f"{attn}.wo_b.weight"))
        lo, hi = (g * self.rank_dim for g in self.view.groups)
        self.decode_wo_a = self.wo_a.rows(lo, hi)
        self.decode_wo_b = self.wo_b.cols(lo, hi)

    def prefill(self, o: Tensor, positions: Tensor) -> Tensor:
        """o [T, H/tp, d] -> [T, D], summed over tp."""
        u = grouped_output(o, positions, self.inv_freq, self.wo_a, self.groups)
        return self._project(u, self.wo_b, self.first_group, self.mesh.tp)

    def decode(self, o: Tensor, positions: Tensor) -> Tensor:
        """o [T, H of the decode slice, d] -> [T, D], summed over the decode group."""
        lo, hi = self.view.groups
        u = grouped_output(o, positions, self.inv_freq, self.decode_wo_a, hi - lo)
        return self._project(u, self.decode_wo_b, self.first_group + lo, self.view.group)

    def _project(self, u: Tensor, wo_b: PreparedWeight, first_group: int, group: Group) -> Tensor:
        start = first_group * self.rank_dim
        amax = None
        if self.quantize and u.shape[1] % _BLOCK and group.size > 1:
            amax = self._shared_amax(u, start, group)
        wide = wide_dtype(u.dtype)
        out = linear(u, wo_b, quantize=self.quantize, amax=amax, out_dtype=wide)
        return group.all_reduce(out).to(u.dtype)

    def _shared_amax(self, u: Tensor, start: int, group: Group) -> Tensor:
        """Block maxima where a rank's columns cut a 128-block: the maximum over all its owners."""
        local = block_amax(u, _BLOCK, col_offset=start % _BLOCK)
        first, count = start // _BLOCK, local.shape[1]
        full = local.new_zeros(u.shape[0], -(-self.columns // _BLOCK))
        full[:, first : first + count] = local
        return group.all_reduce(full, "max")[:, first : first + count].contiguous()
