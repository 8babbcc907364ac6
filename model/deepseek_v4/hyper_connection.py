"""Manifold-constrained hyper-connections: R residual streams, mixed before and after each sub-layer.

X is [T, R, D] in the compute dtype; mixing runs in float32. The post mix of a sub-layer and the pre mix
of the next, its norm included, are one op: so a sub-layer hands on its output unmixed (``Residual``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kernels import hc_head, hc_post, hc_post_pre, hc_post_pre_norm, hc_pre, hc_pre_norm
from model.deepseek_v4.projection import Activations, Projector

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config


@dataclass(frozen=True, slots=True)
class SubLayerOutput:
    """A sub-layer's output [T, D] and the mix that brings it back: post [T, R], comb [T, R, R].

    The output may be a float32 sum over ranks: it is rounded to the streams' dtype where it is mixed in.
    """

    out: Tensor
    post: Tensor
    comb: Tensor


@dataclass(frozen=True, slots=True)
class Residual:
    """The streams between two sub-layers.

    Args:
        streams: [T, R, D], as the last sub-layer read them.
        pending: what it gave, not yet mixed in; None before the first one.
    """

    streams: Tensor
    pending: SubLayerOutput | None = None

    def mixed(self) -> Tensor:
        """The streams with everything mixed in."""
        if self.pending is None:
            return self.streams
        last = self.pending
        return hc_post(last.out.to(self.streams.dtype), self.streams, last.post, last.comb)


@dataclass(frozen=True, slots=True)
class SubLayerInput:
    """What a sub-layer reads (``x``: normed rows) and what is needed to take its output back."""

    streams: Tensor
    x: Activations
    post: Tensor
    comb: Tensor

    def give(self, out: Tensor) -> Residual:
        """The residual after the sub-layer gave ``out`` [T, D]."""
        return Residual(self.streams, SubLayerOutput(out, self.post, self.comb))


class HyperConnection:
    """The mixing before one sub-layer (``hc_attn_*`` or ``hc_ffn_*``), and the sub-layer's norm."""

    def __init__(
        self,
        config: DeepSeekV4Config,
        weights: WeightDict,
        prefix: str,
        norm: str,
        projector: Projector,
    ) -> None:
        self.projector, self.rms_eps = projector, config.rms_norm_eps
        self.mix = tuple(weights.tensor(f"{prefix}_{part}") for part in ("fn", "scale", "base"))
        self.norm = weights.tensor(norm)
        self.constants: dict[str, Any] = {
            "iters": config.hc_sinkhorn_iters,
            "eps": config.hc_eps,
            "norm_eps": config.rms_norm_eps,
        }

    def __call__(self, residual: Residual) -> SubLayerInput:
        """Mix in what is pending, collapse the streams to rows [T, D], norm them."""
        last, streams = residual.pending, residual.streams
        if self.projector.fused:
            return self._fused(streams, last)
        fn, scale, base = self.mix
        if last is None:
            x, post, comb = hc_pre(streams, fn, scale, base, **self.constants)
        else:
            streams, x, post, comb = hc_post_pre(
                last.out, streams, last.post, last.comb, fn, scale, base, **self.constants
            )
        return SubLayerInput(streams, self.projector.norm(x, self.norm, self.rms_eps), post, comb)

    def _fused(self, streams: Tensor, last: SubLayerOutput | None) -> SubLayerInput:
        fn, scale, base = self.mix
        if last is None:
            normed, rows, post, comb = hc_pre_norm(
                streams, fn, scale, base, self.norm, rms_eps=self.rms_eps, **self.constants
            )
        else:
            streams, normed, rows, post, comb = hc_post_pre_norm(
                last.out,
                streams,
                last.post,
                last.comb,
                fn,
                scale,
                base,
                self.norm,
                rms_eps=self.rms_eps,
                **self.constants,
            )
        return SubLayerInput(streams, Activations(normed, rows), post, comb)


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
