"""How many blocks, slots and tails a rank gets: arithmetic shared by the worker, `check` and `plan`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.platform import free_memory
from model.cache_spec import CacheSpec
from model.errors import CapacityError
from model.parallel.collectives import Group
from worker.config import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Counts of the world, bytes of one rank."""

    num_blocks: int
    num_slots: int
    num_tails: int
    max_model_len: int
    total_bytes: int


def size_cache(spec: CacheSpec, config: WorkerConfig, budget: int, itemsize: int) -> CacheSize:
    """Fit the caches of one rank into ``budget`` bytes.

    Args:
        spec: sizes of one block, slot and tail.
        config: counts that the user fixed.
        budget: bytes for all caches; not used where ``kv_cache.num_blocks`` is a number.
        itemsize: bytes per value of the residual streams.

    Raises:
        CapacityError: one request of ``max_model_len`` tokens does not fit, or ``kv_shard: cp`` leaves
            a cp rank without a block.
    """
    kv = config.kv_cache
    max_len = config.model.max_model_len or spec.config.max_position_embeddings
    num_slots = config.scheduler.max_num_seqs
    fixed = num_slots * spec.slot_bytes(itemsize)
    tail_bytes = spec.tail_bytes(itemsize)
    if kv.num_tails != "auto":
        num_tails = kv.num_tails
    elif not config.scheduler.prefix_cache:
        num_tails = 0
    else:
        num_tails = 2 * num_slots + 16
    if kv.num_blocks != "auto":
        num_blocks = kv.num_blocks
    else:
        num_blocks = spec.blocks_that_fit(max(budget - fixed - num_tails * tail_bytes, 0))
        if not config.model.max_model_len:
            # Nobody asked for a length: serve the longest request that fits.
            max_len = min(max_len, num_blocks * spec.block_size)
    needed = -(-max_len // spec.block_size)
    if num_blocks < max(needed, 1):
        if config.model.max_model_len or kv.num_blocks == "auto":
            asked = config.model.max_model_len
            request = f"one request of max_model_len {asked} tokens" if asked else "one request"
            room = f"kv_cache.num_blocks is {num_blocks}"
            if kv.num_blocks == "auto":
                room = (
                    f"{num_blocks} fit into {max(budget, 0)} bytes, of which {fixed} are for the"
                    f" slots of {num_slots} requests (scheduler.max_num_seqs) and"
                    f" {num_tails * tail_bytes} for {num_tails} saved tails"
                )
            raise CapacityError(
                f"{request} needs {max(needed, 1)} KV blocks of {spec.block_size} tokens; {room}"
            )
        max_len = num_blocks * spec.block_size
    if spec.parallel.kv_shard == "cp" and num_blocks < spec.parallel.cp:
        raise CapacityError(
            f"kv_cache.num_blocks {num_blocks} with parallel.kv_shard cp: each of the"
            f" {spec.parallel.cp} cp ranks needs at least one block"
        )
    total = spec.pool_bytes(num_blocks) + fixed + num_tails * tail_bytes
    return CacheSize(
        num_blocks=num_blocks,
        num_slots=num_slots,
        num_tails=num_tails,
        max_model_len=max_len,
        total_bytes=total,
    )


def plan_cache(
    spec: CacheSpec,
    config: WorkerConfig,
    device: torch.device,
    world: Group,
    streams_dtype: torch.dtype,
) -> CacheSize:
    """Size this rank's caches from the memory of its device; the smallest budget of the world counts."""
    if device.type == "cpu":
        budget = config.kv_cache.cpu_bytes
    else:
        free, total = free_memory(device)
        budget = free - int(total * (1 - config.kv_cache.memory_fraction))
    # The minimum as a maximum of negatives: every rank must come to the same counts.
    shared = torch.tensor([-budget], dtype=torch.int64, device=device)
    world.all_reduce(shared, "max")
    return size_cache(spec, config, -int(shared.item()), streams_dtype.itemsize)
