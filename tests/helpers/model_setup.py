"""Small V4 models of random weights, and ways to run them, for whole-model tests on any mesh."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.parallel.config import ParallelConfig
from worker.config import (
    KVCacheConfig,
    ModelSource,
    SchedulerConfig,
    SpeculativeConfig,
    WorkerConfig,
)

VOCAB = 128

# Every layer kind, hash and score routing, a selection that leaves entries out, an MTP block. A rank's
# rows of wo_a cut a scale block; 4 heads and 4 groups divide over 4 ranks.
SHAPE: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 4,
    "o_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 32,
    "sliding_window": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "expert_dtype": "fp4",
    "hidden_act": "silu",
    "swiglu_limit": 4.0,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "hc_mult": 4,
    "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def write_shape(folder: Path, **changes: Any) -> str:
    """Write ``SHAPE`` with changes as a config.json; returns its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(SHAPE | changes))
    return str(path)


def stream(number: int, length: int) -> list[int]:
    """The first tokens of an endless random text; a longer length continues a shorter one."""
    return np.random.default_rng(1000 + number).integers(0, VOCAB, 4096)[:length].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to run the model. ``shape`` is a config.json (random weights), ``path`` a checkpoint."""

    shape: str = ""
    path: str = ""
    seed: int = 3
    cp: int = 1
    tp: int = 1
    gather: str = "compressed"
    shard: str = "replicate"
    numerics: str = "fp32"
    dtype: str = "auto"
    block_size: int = 128
    mtp: int = 0
    load_mtp: bool = True
    min_tokens: int = 0
    combine: str = "fast"
    dcp: bool = False
    num_blocks: int = 64
    slots: int = 8
    tails: int = 6
    max_len: int = 2048

    @property
    def name(self) -> str:
        """What differs between the setups of one test."""
        parts = f"cp{self.cp}tp{self.tp}-{self.gather}-{self.shard}-{self.numerics}-{self.combine}"
        return f"{parts}-b{self.block_size}-mtp{self.mtp}-min{self.min_tokens}-dcp{self.dcp:d}"

    def alone(self) -> Setup:
        """The same model on one rank."""
        return replace(self, cp=1, tp=1, shard="replicate", dcp=False)

    def worker_config(self) -> WorkerConfig:
        """As the rank gets it."""
        return WorkerConfig(
            model=ModelSource(
                path=self.path,
                shape=self.shape,
                load_format="safetensors" if self.path else "random",
                numerics=self.numerics,  # type: ignore[arg-type]
                max_model_len=self.max_len,
                seed=self.seed,
            ),
            device="cpu",
            parallel=ParallelConfig(
                cp=self.cp,
                tp=self.tp,
                cp_gather=self.gather,  # type: ignore[arg-type]
                kv_shard=self.shard,  # type: ignore[arg-type]
                cp_min_tokens=self.min_tokens,
                moe_combine=self.combine,  # type: ignore[arg-type]
                dcp=self.dcp,
            ),
            kv_cache=KVCacheConfig(
                dtype=self.dtype,  # type: ignore[arg-type]
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                num_tails=self.tails,
            ),
            scheduler=SchedulerConfig(max_num_seqs=self.slots),
            speculative=SpeculativeConfig(mtp=self.mtp),
            load_mtp=self.load_mtp,
        )
