"""Mixture of experts: the gate (score- or hash-routed), routed experts on their ranks, shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import expert_ffn, linear, moe_gate, prepare_experts, prepare_weight, swiglu

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
    ) -> None:
        self.topk, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.limit, self.quantize = config.swiglu_limit, numerics.quantize
        self.parallel = experts
        ffn = f"{prefix}.ffn"
        self.gate = weights.tensor(f"{ffn}.gate.weight")
        self.tid2eid = weights.tensor(f"{ffn}.gate.tid2eid") if hashed else None
        self.bias = None if hashed else weights.tensor(f"{ffn}.gate.bias")

        def expert(name: str) -> list[BlockWeight]:
            owned = range(experts.first_expert, experts.first_expert + experts.num_local)
            return [weights.block(f"{ffn}.experts.{e}.{name}.weight") for e in owned]

        self.experts = prepare_experts(expert("w1"), expert("w3"), expert("w2"))
        shared = f"{ffn}.shared_experts"
        self.w1 = prepare_weight(weights.block(f"{shared}.w1.weight"))
        self.w3 = prepare_weight(weights.block(f"{shared}.w3.weight"))
        self.w2 = prepare_weight(weights.block(f"{shared}.w2.weight"))

    def forward(self, x: Tensor, input_ids: Tensor, *, replicated: bool) -> Tensor:
        """x: ffn-normed rows [T, D]; ids [T] -> [T, D].

        Args:
            replicated: every rank of the world holds these same rows.
        """
        ids, route_weights = moe_gate(
            x,
            self.gate,
            k=self.topk,
            route_scale=self.route_scale,
            bias=self.bias,
            tid2eid=self.tid2eid,
            token_ids=None if self.tid2eid is None else input_ids,
        )
        y = self.parallel.forward(
            x, ids, route_weights, self._run, replicated=replicated, shared=self._shared
        )
        return y.to(x.dtype)

    def _run(self, rows: Tensor, offsets: Tensor, row_weight: Tensor) -> Tensor:
        return expert_ffn(
            rows, offsets, row_weight, self.experts, limit=self.limit, quantize=self.quantize
        )

    def _shared(self, x: Tensor) -> Tensor:
        gate = linear(x, self.w1, quantize=self.quantize)
        up = linear(x, self.w3, quantize=self.quantize)
        a = swiglu(gate, up, limit=self.limit)
        return linear(a, self.w2, quantize=self.quantize)
