"""The V4 model configuration: the official ``config.json`` keys, checked, plus derived sizes."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import CheckpointError

CSA_RATIO = 4
HCA_RATIO = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN parameters of the compressed-attention RoPE table (no magnitude factor in V4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeekV4Config:
    """Shape of a V4 model under the checkpoint's own names. Flash and Pro are two instances."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    compress_ratios: tuple[int, ...]  # num_hidden_layers entries; MTP blocks are always ratio 0
    max_position_embeddings: int
    num_nextn_predict_layers: int
    expert_dtype: str  # "fp4" (release) or "fp8" (Base)
    bos_token_id: int
    eos_token_id: int
    dspark: bool = False  # a 0731 release: its mtp.* blocks draft in another way and are not used

    @property
    def num_mtp_layers(self) -> int:
        """MTP blocks this project can run: 0 or 1."""
        return 0 if self.dspark else min(1, self.num_nextn_predict_layers)

    @property
    def heads_per_group(self) -> int:
        """Attention heads that share one output group of ``wo_a``."""
        return self.num_attention_heads // self.o_groups

    @property
    def softmax_scale(self) -> float:
        """Attention logit scale, head_dim ** -0.5."""
        return math.pow(self.head_dim, -0.5)

    @property
    def index_weight_scale(self) -> float:
        """Scale folded into the indexer's head weights: index_head_dim^-0.5 * index_n_heads^-0.5."""
        return math.pow(self.index_head_dim, -0.5) * math.pow(self.index_n_heads, -0.5)

    def layer_ratio(self, layer: int) -> int:
        """Compression ratio: 0 sliding only, 4 CSA, 128 HCA. Layer n_layers is the MTP block."""
        return 0 if layer >= self.num_hidden_layers else self.compress_ratios[layer]

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the layer routes tokens by ``tid2eid`` instead of scores."""
        return layer < self.num_hash_layers

    def inv_freq(self, ratio: int) -> tuple[float, ...]:
        """RoPE frequencies, qk_rope_head_dim / 2: table M for ratio 0, else table C with YaRN.

        Every step is rounded to float32, as in the official tables: far from position 0 one unit in
        the last place of a frequency turns the angle by more than all later rounding.
        """
        dim = self.qk_rope_head_dim
        theta = self.rope_theta if ratio == 0 else self.compress_rope_theta
        freqs = [_f32(1.0 / _f32(theta ** (2 * i / dim))) for i in range(dim // 2)]
        if ratio == 0 or self.rope_scaling is None:
            return tuple(freqs)
        yarn = self.rope_scaling

        def correction(rotations: float) -> float:
            span = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return dim * math.log(span) / (2 * math.log(theta))

        low = max(math.floor(correction(yarn.beta_fast)), 0)
        high = min(math.ceil(correction(yarn.beta_slow)), dim - 1)
        span = (high - low) or 1e-3
        ramps = [_f32(min(max((i - low) / span, 0.0), 1.0)) for i in range(dim // 2)]
        keeps = [_f32(1.0 - r) for r in ramps]
        return tuple(
            _f32(_f32(_f32(f / yarn.factor) * _f32(1.0 - keep)) + _f32(f * keep))
            for f, keep in zip(freqs, keeps, strict=True)
        )

    @classmethod
    def from_file(cls, path: Path) -> DeepSeekV4Config:
        """Read an official ``config.json``.

        Raises:
            CheckpointError: unreadable file, missing or mis-typed key, or a shape V4 cannot have.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as err:
            raise CheckpointError(f"{path.name}: not a readable JSON config: {err}") from err
        return cls.from_dict(raw, where=path.name)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, where: str = "config.json") -> DeepSeekV4Config:
        """Build from the official keys; see ``from_file`` for the errors."""
        from_reader = _Reader(raw, where)
        return from_reader.build()


def _f32(value: float) -> float:
    """``value`` rounded to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


class _Reader:
    """Reads typed keys out of the raw dict, with one clear error each."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: expected a JSON object, got {type(raw).__name__}")
        self.raw, self.where = raw, where

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(
                f"{self.where}: {key} = {value!r}, allowed: an integer in {low}..{high}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(
                f"{self.where}: {key} = {value!r}, allowed: a number in 0..1e12, exclusive"
            )
        return float(value)

    def build(self) -> DeepSeekV4Config:
        if self.raw.get("model_type", "deepseek_v4") != "deepseek_v4":
            raise CheckpointError(
                f"{self.where}: model_type = {self.raw['model_type']!r}, allowed: 'deepseek_v4'"
            )
        layers = self.integer("num_hidden_layers", 1, 1024)
        ratios = self.raw.get("compress_ratios")
        if not isinstance(ratios, list) or len(ratios) < layers:
            raise CheckpointError(
                f"{self.where}: compress_ratios must list at least num_hidden_layers = {layers} ratios"
            )
        # Some engines write 1 for a sliding-window layer.
        main = tuple(0 if r == 1 else r for r in ratios[:layers])
        for layer, ratio in enumerate(main):
            if not isinstance(ratio, int) or ratio not in (0, CSA_RATIO, HCA_RATIO):
                raise CheckpointError(
                    f"{self.where}: compress_ratios[{layer}] = {ratio!r},"
                    f" allowed: 0, {CSA_RATIO}, {HCA_RATIO}"
                )
        expert_dtype = self.raw.get("expert_dtype", "fp4")
        if expert_dtype not in ("fp4", "fp8"):
            raise CheckpointError(
                f"{self.where}: expert_dtype = {expert_dtype!r}, allowed: 'fp4', 'fp8'"
            )
        if self.raw.get("scoring_func", "sqrtsoftplus") != "sqrtsoftplus":
            raise CheckpointError(
                f"{self.where}: scoring_func = {self.raw['scoring_func']!r}, allowed: 'sqrtsoftplus'"
            )
        config = DeepSeekV4Config(
            vocab_size=self.integer("vocab_size", 1, 1 << 24),
            hidden_size=self.integer("hidden_size", 32, 1 << 17),
            num_hidden_layers=layers,
            num_attention_heads=self.integer("num_attention_heads", 1, 4096),
            head_dim=self.integer("head_dim", 8, 4096),
            qk_rope_head_dim=self.integer("qk_rope_head_dim", 2, 1024),
            q_lora_rank=self.integer("q_lora_rank", 1, 1 << 16),
            o_groups=self.integer("o_groups", 1, 1024),
            o_lora_rank=self.integer("o_lora_rank", 1, 1 << 16),
            sliding_window=self.integer("sliding_window", 1, 1 << 16),
            index_n_heads=self.integer("index_n_heads", 1, 4096),
            index_head_dim=self.integer("index_head_dim", 32, 4096),
            index_topk=self.integer("index_topk", 1, 1 << 20),
            n_routed_experts=self.integer("n_routed_experts", 1, 1 << 14),
            n_shared_experts=self.integer("n_shared_experts", 1, 1, 1),
            num_experts_per_tok=self.integer("num_experts_per_tok", 1, 64),
            moe_intermediate_size=self.integer("moe_intermediate_size", 32, 1 << 17),
            num_hash_layers=self.integer("num_hash_layers", 0, layers, 0),
            routed_scaling_factor=self.number("routed_scaling_factor"),
            swiglu_limit=self.number("swiglu_limit"),
            hc_mult=self.integer("hc_mult", 1, 16, 4),
            hc_sinkhorn_iters=self.integer("hc_sinkhorn_iters", 1, 1000, 20),
            hc_eps=self.number("hc_eps", 1e-6),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_theta=self.number("rope_theta"),
            compress_rope_theta=self.number("compress_rope_theta"),
            rope_scaling=self.rope_scaling(),
            compress_ratios=main,
            max_position_embeddings=self.integer("max_position_embeddings", 1, 1 << 40),
            num_nextn_predict_layers=self.integer("num_nextn_predict_layers", 0, 16, 0),
            expert_dtype=expert_dtype,
            bos_token_id=self.integer("bos_token_id", 0, 1 << 24, 0),
            eos_token_id=self.integer("eos_token_id", 0, 1 << 24, 1),
            dspark=any(key.startswith("dspark_") for key in self.raw),
        )
        self.check_shapes(config)
        return config

    def rope_scaling(self) -> RopeScaling | None:
        raw = self.raw.get("rope_scaling")
        if raw is None:
            return None
        reader = _Reader(raw, f"{self.where}: rope_scaling")
        kind = raw.get("type", raw.get("rope_type", "yarn"))
        if kind != "yarn":
            raise CheckpointError(f"{self.where}: rope_scaling.type = {kind!r}, allowed: 'yarn'")
        return RopeScaling(
            factor=reader.number("factor"),
            original_max_position_embeddings=reader.integer(
                "original_max_position_embeddings", 1, 1 << 40
            ),
            beta_fast=reader.number("beta_fast", 32),
            beta_slow=reader.number("beta_slow", 1),
        )

    def check_shapes(self, c: DeepSeekV4Config) -> None:
        checks = [
            (c.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {c.qk_rope_head_dim} must be even"),
            (
                c.qk_rope_head_dim <= min(c.head_dim, c.index_head_dim),
                f"qk_rope_head_dim {c.qk_rope_head_dim} must not exceed head_dim {c.head_dim}"
                f" or index_head_dim {c.index_head_dim}",
            ),
            (
                c.num_attention_heads % c.o_groups == 0,
                f"num_attention_heads {c.num_attention_heads} must be a multiple of o_groups {c.o_groups}",
            ),
            (
                c.index_head_dim & (c.index_head_dim - 1) == 0,
                f"index_head_dim {c.index_head_dim} must be a power of two (Hadamard rotation)",
            ),
            (
                c.num_experts_per_tok <= c.n_routed_experts,
                f"num_experts_per_tok {c.num_experts_per_tok} exceeds n_routed_experts {c.n_routed_experts}",
            ),
            (
                c.hidden_size % 32 == 0 and c.moe_intermediate_size % 32 == 0,
                f"hidden_size {c.hidden_size} and moe_intermediate_size {c.moe_intermediate_size}"
                " must be multiples of 32 (FP4 scale blocks)",
            ),
            (
                (c.head_dim - c.qk_rope_head_dim) % 64 == 0,
                f"head_dim - qk_rope_head_dim = {c.head_dim - c.qk_rope_head_dim} must be a multiple of 64"
                " (FP8 KV blocks)",
            ),
        ]
        for ok, message in checks:
            if not ok:
                raise CheckpointError(f"{self.where}: {message}")
