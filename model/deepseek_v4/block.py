"""One transformer block: attention and MoE, each between a pre and a post mix of the streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import rms_norm
from model.deepseek_v4.attention import Attention
from model.deepseek_v4.hyper_connection import HyperConnection
from model.deepseek_v4.moe import MoE

if TYPE_CHECKING:
    from kernels import Numerics
    from model.cache_spec import LayerCache
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.forward_batch import DecodeBatch, PrefillBatch, WindowPlan
    from model.parallel.config import ParallelConfig
    from model.parallel.expert import ExpertParallel
    from model.parallel.mesh import ParallelMesh


class Block:
    """``layers.N`` or ``mtp.0``; X is [T, R, D]."""

    def __init__(
        self,
        config: DeepSeekV4Config,
        parallel: ParallelConfig,
        numerics: Numerics,
        weights: WeightDict,
        prefix: str,
        *,
        ratio: int,
        hashed: bool,
        mesh: ParallelMesh,
        experts: ExpertParallel,
    ) -> None:
        self.eps = config.rms_norm_eps
        self.hc_attn = HyperConnection(config, weights, f"{prefix}.hc_attn")
        self.hc_ffn = HyperConnection(config, weights, f"{prefix}.hc_ffn")
        self.attn_norm = weights.tensor(f"{prefix}.attn_norm.weight")
        self.ffn_norm = weights.tensor(f"{prefix}.ffn_norm.weight")
        self.attn = Attention(config, parallel, numerics, weights, prefix, ratio, mesh)
        self.ffn = MoE(config, numerics, weights, prefix, hashed=hashed, experts=experts)

    def prefill(self, streams: Tensor, batch: PrefillBatch, cache: LayerCache) -> Tensor:
        """The local rows of a prefill step, through the block."""
        x, post, comb = self.hc_attn.pre(streams)
        a = self.attn.prefill(rms_norm(x, self.attn_norm, self.eps), batch, cache)
        streams = self.hc_attn.post(a, streams, post, comb)
        return self._feed_forward(streams, batch.input_ids, replicated=batch.replicated)

    def decode(self, streams: Tensor, batch: DecodeBatch, cache: LayerCache) -> Tensor:
        """All rows of a decode step, through the block."""
        x, post, comb = self.hc_attn.pre(streams)
        a = self.attn.decode(rms_norm(x, self.attn_norm, self.eps), batch, cache)
        streams = self.hc_attn.post(a, streams, post, comb)
        return self._feed_forward(streams, batch.input_ids, replicated=True)

    def store_window(
        self, streams: Tensor, positions: Tensor, plan: WindowPlan, cache: LayerCache
    ) -> None:
        """Only keep the window latents of these rows: all that a window-only block leaves behind."""
        x, _, _ = self.hc_attn.pre(streams)
        self.attn.store_window(rms_norm(x, self.attn_norm, self.eps), positions, plan, cache)

    def _feed_forward(self, streams: Tensor, input_ids: Tensor, *, replicated: bool) -> Tensor:
        x, post, comb = self.hc_ffn.pre(streams)
        f = self.ffn.forward(rms_norm(x, self.ffn_norm, self.eps), input_ids, replicated=replicated)
        return self.hc_ffn.post(f, streams, post, comb)
