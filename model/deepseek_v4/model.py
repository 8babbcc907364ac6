"""The whole V4 model on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from kernels import linear, prepare_weight, rms_norm
from model.deepseek_v4.block import Block
from model.deepseek_v4.hyper_connection import HyperHead, Residual
from model.deepseek_v4.mtp import MTPBlock
from model.parallel.expert import ExpertParallel
from model.parallel.vocab import VocabLogits

if TYPE_CHECKING:
    from kernels import Numerics
    from model.cache_spec import LayerCache
    from model.checkpoint.loader import WeightDict
    from model.deepseek_v4.config import DeepSeekV4Config
    from model.forward_batch import DecodeBatch, PrefillBatch
    from model.parallel.config import ParallelConfig
    from model.parallel.mesh import ParallelMesh


class DeepSeekV4:
    """Embedding, blocks, head and, when its weights are there, the MTP block.

    Args:
        config: the model's shape.
        parallel: mesh sizes and choices.
        numerics: arithmetic of all layers.
        weights: this rank's slices; every tensor must be taken exactly once.
        mesh: live groups.
        with_mtp: build the MTP block.
        keep_fp4: leave FP4 experts packed on a GPU.
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        parallel: ParallelConfig,
        numerics: Numerics,
        weights: WeightDict,
        mesh: ParallelMesh,
        *,
        with_mtp: bool,
        keep_fp4: bool = False,
    ) -> None:
        self.config, self.mesh, self.numerics = config, mesh, numerics
        experts = ExpertParallel(mesh, config.n_routed_experts, parallel.moe_combine)
        self.embed = weights.tensor("embed.weight")
        self.blocks = [
            Block(
                config,
                parallel,
                numerics,
                weights,
                f"layers.{layer}",
                ratio=config.layer_ratio(layer),
                hashed=config.is_hash_layer(layer),
                mesh=mesh,
                experts=experts,
                keep_fp4=keep_fp4,
            )
            for layer in range(config.num_hidden_layers)
        ]
        self.hc_head = HyperHead(config, weights, "hc_head")
        self.norm = weights.tensor("norm.weight")
        self.head = prepare_weight(weights.block("head.weight"))
        self.mtp = (
            MTPBlock(config, parallel, numerics, weights, mesh, experts, keep_fp4=keep_fp4)
            if with_mtp
            else None
        )
        weights.finish()

    def embedding(self, ids: Tensor) -> Tensor:
        """Token ids [T] -> [T, D] in the compute dtype."""
        return functional.embedding(ids, self.embed).to(self.numerics.dtype)

    def prefill(self, batch: PrefillBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Run a prefill step's local rows; returns the streams after the last block [T, R, D]."""
        residual = Residual(self._streams(batch.input_ids))
        for block, cache in zip(self.blocks, caches, strict=False):
            residual = block.prefill(residual, batch, cache)
        return residual.mixed()

    def decode(self, batch: DecodeBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Run a decode step's rows; returns the streams after the last block [T, R, D]."""
        residual = Residual(self._streams(batch.input_ids))
        for block, cache in zip(self.blocks, caches, strict=False):
            residual = block.decode(residual, batch, cache)
        return residual.mixed()

    def head_rows(self, streams: Tensor) -> Tensor:
        """Streams [T, R, D] -> normed rows for the LM head [T, D]."""
        return rms_norm(self.hc_head(streams), self.norm, self.config.rms_norm_eps)

    def local_logits(self, rows: Tensor) -> Tensor:
        """Head rows [N, D], the same on every rank -> this rank's columns, float32 [N, share]."""
        return linear(rows, self.head, quantize=False, out_dtype=torch.float32)

    def sharded(self, local: Tensor) -> VocabLogits:
        """What ``local_logits`` gave, with all that is needed to complete it."""
        return VocabLogits(local=local, vocab_size=self.config.vocab_size, group=self.mesh.world)

    def logits(self, rows: Tensor) -> VocabLogits:
        """Head rows, the same on every rank [N, D] -> their logits."""
        return self.sharded(self.local_logits(rows))

    def _streams(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x[:, None].expand(-1, self.config.hc_mult, -1).contiguous()
