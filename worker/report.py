"""What a rank would be, without being one: used by `check` and `plan`, starts and allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import Numerics
from kernels.dispatch import describe, without_kernel
from kernels.platform import PlatformError, capability, resolve_device
from model.cache_spec import CacheSpec
from model.checkpoint.source import load_config, open_source
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.held_bytes import held_bytes
from model.deepseek_v4.projection import Projector
from model.deepseek_v4.shared_expert import is_shared_out
from model.deepseek_v4.weights import check_mesh, plan_bytes, weight_plan
from model.parallel.config import MeshCoord, adds_up
from worker.cache_size import CacheSize, size_cache
from worker.config import WorkerConfig
from worker.worker import cache_dtype

__all__ = [
    "MemoryReport",
    "ModelReport",
    "PlatformError",
    "RankMemory",
    "device_memory",
    "inspect_model",
    "kernel_gaps",
    "kernel_table",
    "memory_report",
    "wire_itemsize",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """A model that could be loaded: its shape as the tensors show it, and lines worth printing."""

    config: DeepSeekV4Config
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank."""

    rank: int
    weights: int
    slots: int
    tails: int
    pools: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.slots + self.tails + self.pools


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The memory plan of a world."""

    spec: CacheSpec
    size: CacheSize
    ranks: tuple[RankMemory, ...]

    @property
    def kv_tokens(self) -> int:
        """Tokens whose compressed KV the pools hold, all requests together."""
        return self.size.num_blocks * self.spec.block_size


def inspect_model(config: WorkerConfig) -> ModelReport:
    """Check config, checkpoint headers and mesh as ``Worker.load`` does; reads no tensor.

    Raises:
        CheckpointError: what ``Worker.load`` would raise before it reads.
    """
    source = config.model
    shape = load_config(path=source.path, shape=source.shape)
    check_mesh(shape, config.parallel)
    weights = open_source(
        shape,
        path=source.path,
        load_format=source.load_format,
        seed=source.seed,
        device=torch.device("cpu"),
    )
    weights.close()
    return ModelReport(config=weights.config, notes=weights.notes)


def memory_report(
    config: WorkerConfig, model: DeepSeekV4Config, budget: int | None = None
) -> MemoryReport:
    """What every rank would hold.

    Args:
        budget: bytes of one rank's device that weights and caches may use together; None: the caches
            get ``kv_cache.cpu_bytes`` and the weights come on top.

    Raises:
        CheckpointError: an impossible mesh.
        CapacityError: the weights, or one request, do not fit.
    """
    with_mtp = model.num_mtp_layers > 0 and (config.load_mtp or config.speculative.mtp > 0)
    numerics = Numerics(config.model.numerics)
    spec = CacheSpec(
        config=model,
        dtype=cache_dtype(config.kv_cache.dtype, numerics),
        block_size=config.kv_cache.block_size,
        max_drafts=config.speculative.mtp if with_mtp else 0,
        with_mtp=with_mtp,
        parallel=config.parallel,
    )
    parallel = config.parallel
    plans = (
        weight_plan(model, MeshCoord(cp=parallel.cp, tp=parallel.tp, rank=rank), load_mtp=with_mtp)
        for rank in range(parallel.world)
    )
    # A budget is that of a GPU, whose kernels read other forms than the checkpoint's.
    shares_out = is_shared_out(Projector(numerics), adds_up(parallel.world, parallel.moe_combine))
    shares = parallel.world if shares_out else 1
    weights = [
        plan_bytes(plan)
        if budget is None
        else held_bytes(plan, keep_fp4=config.model.keep_fp4, shares=shares)
        for plan in plans
    ]
    room = config.kv_cache.cpu_bytes if budget is None else budget - max(weights)
    itemsize = numerics.dtype.itemsize
    size = size_cache(spec, config, room, itemsize)
    ranks = tuple(
        RankMemory(
            rank=rank,
            weights=held,
            slots=size.num_slots * spec.slot_bytes(itemsize),
            tails=size.num_tails * spec.tail_bytes(itemsize),
            pools=spec.pool_bytes(size.num_blocks),
        )
        for rank, held in enumerate(weights)
    )
    return MemoryReport(spec=spec, size=size, ranks=ranks)


def wire_itemsize(config: WorkerConfig) -> int:
    """Bytes of one activation value on the wire."""
    return Numerics(config.model.numerics).dtype.itemsize


def device_memory(choice: str) -> tuple[str, int | None]:
    """The device that ``device: choice`` means here, in words, and its bytes (None: the CPU).

    Raises:
        PlatformError: a device this machine does not have.
    """
    cap = capability(resolve_device(choice))
    if cap.device_type == "cpu":
        return "cpu", None
    return f"{cap.device_type} ({cap.name})", cap.memory_bytes


def kernel_table(choice: str) -> list[tuple[str, str, str]]:
    """``(op, implementation, why)`` on the device that ``device: choice`` means here."""
    return describe(resolve_device(choice))


def kernel_gaps(choice: str) -> list[str]:
    """Ops that would run their torch twin although the device is a GPU."""
    return without_kernel(resolve_device(choice))
