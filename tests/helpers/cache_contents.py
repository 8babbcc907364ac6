"""What a rank's caches hold: filled with poison, read back, and put together from all ranks."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from kernels import PageLayout, load_entries
from model.cache_spec import LayerCache
from tests.helpers.model_setup import Setup
from worker.kv_cache import KVCachePool

POISON = 0xFF  # as bytes: NaN in float32, bfloat16 and float8_e4m3


def poison_layer(layer: LayerCache) -> None:
    """Fill every cache of a layer with NaN."""
    for f in fields(layer):
        value = getattr(layer, f.name)
        if isinstance(value, Tensor):
            value.fill_(POISON if value.dtype == torch.uint8 else float("nan"))


def poison_slot(pool: KVCachePool, slot: int) -> None:
    """Fill one slot's rings, states and streams with NaN: nobody may have left anything there."""
    for layer in pool.layers:
        layer.window[slot] = POISON
        if layer.ratio:
            rows = pool.spec.state_rows(layer.ratio)
            layer.state[slot * rows : (slot + 1) * rows] = float("nan")
    rows = pool.stream_rows
    pool.streams[slot * rows : (slot + 1) * rows] = float("nan")


def merged(ranks: list[list[dict[str, Tensor]]], setup: Setup) -> list[dict[str, Tensor]]:
    """One rank's view of all ranks' contents: equal where replicated, each entry once per tp rank."""
    out = []
    for layer in range(len(ranks[0])):
        parts = [contents[layer] for contents in ranks]
        whole = dict(parts[0])
        for name, first in parts[0].items():
            copies = torch.stack([p[name] for p in parts])
            if name == "main" and setup.shard == "cp":
                present = ~copies.isnan().any(-1)
                assert (present.sum(0) == setup.tp).all(), f"layer {layer}: not on one owner each"
                whole[name] = copies.nan_to_num(float("-inf")).amax(0)
            else:
                assert (copies == first).all(), f"layer {layer}: {name} differs between the ranks"
        out.append(whole)
    return out


def entries_at(pool: Tensor, layout: PageLayout, rows: np.ndarray) -> Tensor:
    """The entries in these slots, float32; that of slot 0 where a slot is negative."""
    return load_entries(pool, layout, torch.from_numpy(np.maximum(rows, 0)), torch.float32)
