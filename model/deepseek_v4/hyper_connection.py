"""Manifold-constrained hyper-connections: R residual streams, mixed before and after each sub-layer.

X is [T, R, D] in the compute dtype; mixing runs in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import hc_head, hc_post, hc_pre

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config


class HyperConnection:
    """The mixing around one sub-layer (``hc_attn_*`` or ``hc_ffn_*``)."""

    def __init__(self, config: DeepSeekV4Config, weights: WeightDict, prefix: str) -> None:
        self.config = config
        self.fn = weights.tensor(f"{prefix}_fn")
        self.scale = weights.tensor(f"{prefix}_scale")
        self.base = weights.tensor(f"{prefix}_base")

    def pre(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams: [T, R, D] -> x [T, D], post [T, R], comb [T, R, R]."""
        c = self.config
        return hc_pre(
            streams,
            self.fn,
            self.scale,
            self.base,
            iters=c.hc_sinkhorn_iters,
            eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )

    @staticmethod
    def post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Spread a sub-layer's output [T, D] over the mixed streams."""
        return hc_post(out, streams, post, comb)


class HyperHead:
    """The final collapse of the streams (``hc_head_*``)."""

    def __init__(self, config: DeepSeekV4Config, weights: WeightDict, prefix: str) -> None:
        self.config = config
        self.fn = weights.tensor(f"{prefix}_fn")
        self.scale = weights.tensor(f"{prefix}_scale")
        self.base = weights.tensor(f"{prefix}_base")

    def __call__(self, streams: Tensor) -> Tensor:
        """[T, R, D] -> [T, D]."""
        c = self.config
        return hc_head(
            streams, self.fn, self.scale, self.base, eps=c.hc_eps, norm_eps=c.rms_norm_eps
        )
