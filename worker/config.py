"""What one rank needs to know; the cluster config composes it, the rank receives it whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.parallel.config import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """``model.*``: where the weights come from and how they are computed with."""

    path: str = ""  # checkpoint directory; empty only with load_format random and a shape
    shape: str = ""  # flash | pro | a config.json; empty: <path>/config.json
    load_format: Literal["auto", "safetensors", "random"] = "auto"
    numerics: Literal["fp32", "fp32_rounded", "release"] = "release"
    max_model_len: int = 0  # tokens; 0 = what the model config allows
    seed: int = 0  # of load_format random
    keep_fp4: bool = False  # on a GPU: FP4 experts stay packed, instead of becoming FP8


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheConfig:
    """``kv_cache.*``."""

    dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    block_size: int = 256  # tokens per logical block, a multiple of 128
    num_blocks: int | Literal["auto"] = "auto"
    tail_interval: int = 32  # blocks between saved tails inside a long prompt
    num_tails: int | Literal["auto"] = "auto"
    memory_fraction: float = 0.9  # of the device memory that may be used in all (CUDA)
    cpu_bytes: int = 1 << 30  # pool budget of one rank on the CPU, with num_blocks auto


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """``scheduler.*``."""

    max_batched_tokens: int = 8192  # tokens of one prefill step
    max_num_seqs: int = 64  # requests that run at once = slots
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """``speculative.*``."""

    mtp: int = 0  # drafts per step, 0..3


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything a rank is built from."""

    model: ModelSource = field(default_factory=ModelSource)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv_cache: KVCacheConfig = field(default_factory=KVCacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    cuda_graphs: bool = True  # decode steps as CUDA graphs, where device and model allow
    prefill_graphs: bool = True  # prefill steps whose shape comes back as CUDA graphs, likewise
    load_mtp: bool = False  # load the MTP block even with speculative.mtp 0 (score --mtp)
    step_deadline_s: float = 60.0
