"""Mixture of experts: the gate (score- or hash-routed), routed experts on their ranks, shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import (
    PreparedExperts,
    QuantRows,
    beside,
    expert_ffn,
    expert_ffn_quant,
    moe_gate,
    prepare_experts,
)
from model.deepseek_v4.projection import Activations, Projector
from model.deepseek_v4.shared_expert import SharedExpert, is_shared_out

if TYPE_CHECKING:
    from kernels import BlockWeight, Numerics
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.parallel.expert import ExpertParallel


class MoE:
    """One layer's experts on one rank.

    Args:
        config, numerics, weights: as in ``Attention``.
        prefix: checkpoint prefix, e.g. ``layers.3``.
        hashed: route by token id (``tid2eid``) instead of scores.
        experts: the expert-parallel group; owns ``first .. first + count`` of the experts.
        keep_fp4: leave FP4 experts packed on a GPU.
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        numerics: Numerics,
        weights: WeightDict,
        prefix: str,
        *,
        hashed: bool,
        experts: ExpertParallel,
        keep_fp4: bool,
    ) -> None:
        self.topk, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.limit, self.projector = config.swiglu_limit, Projector(numerics)
        self.parallel = experts
        ffn = f"{prefix}.ffn"
        self.gate = weights.tensor(f"{ffn}.gate.weight")
        self.tid2eid = weights.tensor(f"{ffn}.gate.tid2eid") if hashed else None
        self.bias = None if hashed else weights.tensor(f"{ffn}.gate.bias")

        def expert(name: str) -> list[BlockWeight]:
            owned = range(experts.first_expert, experts.first_expert + experts.num_local)
            return [weights.block(f"{ffn}.experts.{e}.{name}.weight") for e in owned]

        self.experts = prepare_experts(expert("w1"), expert("w3"), expert("w2"), keep_fp4=keep_fp4)
        self.shares = is_shared_out(self.projector, experts.adds_up)
        self.shared = SharedExpert(
            weights,
            f"{ffn}.shared_experts",
            self.projector,
            self.limit,
            experts.mesh.world if self.shares else None,
        )
        # Routed rows travel and are grouped in FP8 where the experts read FP8.
        reads_fp8 = all(w[0].kind.rounds_activations for w in (self.experts.w1, self.experts.w3))
        self.fp8_rows = self.projector.fused and reads_fp8

    @property
    def walks_experts(self) -> bool:
        """Whether the experts have no stacked form: one after the other, by bounds on the host."""
        return type(self.experts) is PreparedExperts

    @property
    def waits_for_host(self) -> bool:
        """Whether a prefill step reads back how many rows travel."""
        return self.parallel.mesh.cp.size > 1 and self.parallel.reads_counts(self.topk)

    def forward(self, x: Activations, input_ids: Tensor, counts: tuple[int, ...] | None) -> Tensor:
        """x: ffn-normed rows [T, D]; ids [T] -> [T, D], wide where ranks added up their parts.

        Args:
            counts: rows of every cp rank in a prefill step (one number: all ranks hold these same
                rows); None in a decode step, whose rows all ranks hold.
        """
        replicated = counts is None or len(counts) == 1
        parts = counts is None and self.shares  # few rows, so that their sum may travel wide
        shared = self.shared.part if parts else self.shared.whole
        if replicated:
            # It needs neither the gate's choice nor the routed experts, so it runs beside them.
            pending = beside(input_ids.device, lambda: shared(x))
        ids, route_weights = moe_gate(
            x.wide(),
            self.gate,
            k=self.topk,
            route_scale=self.route_scale,
            bias=self.bias,
            tid2eid=self.tid2eid,
            token_ids=None if self.tid2eid is None else input_ids,
        )
        return self.parallel.forward(
            x.quant if self.fp8_rows and x.quant is not None else x.wide(),
            ids,
            route_weights,
            self._run,
            counts=None if replicated else counts,
            parts=parts,
            shared=lambda start, stop: pending() if replicated else shared(x.slice(start, stop)),
            dtype=self.projector.dtype,
        )

    def _run(self, rows: Tensor | QuantRows, offsets: Tensor, row_weight: Tensor) -> Tensor:
        if isinstance(rows, QuantRows):
            return expert_ffn_quant(
                rows,
                offsets,
                row_weight,
                self.experts,
                limit=self.limit,
                out_dtype=self.projector.dtype,
            )
        return expert_ffn(
            rows,
            offsets,
            row_weight,
            self.experts,
            limit=self.limit,
            quantize=self.projector.quantize,
        )
