"""The multi-token-prediction block ``mtp.0``.

At position t it combines the main model's streams of t with the embedding of token t + 1 and proposes
token t + 2. Further drafts feed its own output back as the streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import linear, prepare_weight, rms_norm
from model.deepseek_v4.block import Block
from model.deepseek_v4.hyper_connection import HyperHead

if TYPE_CHECKING:
    from kernels import Numerics
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.parallel.config import ParallelConfig
    from model.parallel.expert import ExpertParallel
    from model.parallel.mesh import ParallelMesh


class MTPBlock:
    """A window-only block with its own input mix and head norm; embedding and head are the main ones."""

    def __init__(
        self,
        config: DeepSeekV4Config,
        parallel: ParallelConfig,
        numerics: Numerics,
        weights: WeightDict,
        mesh: ParallelMesh,
        experts: ExpertParallel,
        *,
        keep_fp4: bool,
    ) -> None:
        prefix = "mtp.0"
        self.eps, self.quantize = config.rms_norm_eps, numerics.quantize
        self.enorm = weights.tensor(f"{prefix}.enorm.weight")
        self.hnorm = weights.tensor(f"{prefix}.hnorm.weight")
        self.norm = weights.tensor(f"{prefix}.norm.weight")
        self.e_proj = prepare_weight(weights.block(f"{prefix}.e_proj.weight"))
        self.h_proj = prepare_weight(weights.block(f"{prefix}.h_proj.weight"))
        self.hc_head = HyperHead(config, weights, f"{prefix}.hc_head")
        self.block = Block(
            config,
            parallel,
            numerics,
            weights,
            prefix,
            ratio=0,
            hashed=False,
            mesh=mesh,
            experts=experts,
            keep_fp4=keep_fp4,
        )

    def inputs(self, streams: Tensor, next_embedding: Tensor) -> Tensor:
        """Mix streams [T, R, D] with the next tokens' embeddings [T, D] -> [T, R, D]."""
        e = rms_norm(next_embedding, self.enorm, self.eps)
        h = rms_norm(streams, self.hnorm, self.eps)
        mixed_e = linear(e, self.e_proj, quantize=self.quantize)
        return mixed_e[:, None] + linear(h, self.h_proj, quantize=self.quantize)

    def head_rows(self, streams: Tensor) -> Tensor:
        """Streams after the block [T, R, D] -> rows for the shared LM head [T, D]."""
        return rms_norm(self.hc_head(streams), self.norm, self.eps)
