"""One transformer block: attention and MoE, each between a pre and a post mix of the streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from model.deepseek_v4.attention import Attention
from model.deepseek_v4.hyper_connection import HyperConnection, Residual
from model.deepseek_v4.moe import MoE
from model.deepseek_v4.projection import Projector

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
    """``layers.N`` or ``mtp.0``; streams are [T, R, D]."""

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
        keep_fp4: bool,
    ) -> None:
        projector = Projector(numerics)
        self.hc_attn, self.hc_ffn = (
            HyperConnection(
                config, weights, f"{prefix}.hc_{part}", f"{prefix}.{part}_norm.weight", projector
            )
            for part in ("attn", "ffn")
        )
        self.attn = Attention(config, parallel, numerics, weights, prefix, ratio, mesh)
        self.ffn = MoE(
            config, numerics, weights, prefix, hashed=hashed, experts=experts, keep_fp4=keep_fp4
        )

    def prefill(self, residual: Residual, batch: PrefillBatch, cache: LayerCache) -> Residual:
        """The local rows of a prefill step, through the block."""
        into = self.hc_attn(residual)
        after = into.give(self.attn.prefill(into.x, batch, cache))
        return self._feed_forward(after, batch.input_ids, batch.counts)

    def decode(self, residual: Residual, batch: DecodeBatch, cache: LayerCache) -> Residual:
        """All rows of a decode step, through the block."""
        into = self.hc_attn(residual)
        after = into.give(self.attn.decode(into.x, batch, cache))
        return self._feed_forward(after, batch.input_ids, None)

    def store_window(
        self, streams: Tensor, positions: Tensor, plan: WindowPlan, cache: LayerCache
    ) -> None:
        """Only keep the window latents of these rows: all that a window-only block leaves behind."""
        into = self.hc_attn(Residual(streams))
        self.attn.store_window(into.x, positions, plan, cache)

    def _feed_forward(
        self, residual: Residual, input_ids: Tensor, counts: tuple[int, ...] | None
    ) -> Residual:
        into = self.hc_ffn(residual)
        return into.give(self.ffn.forward(into.x, input_ids, counts))
