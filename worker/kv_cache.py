"""The caches of one rank: allocation, and copies between slots and tails."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels import load_entries, store_entries
from model.cache_spec import CacheSpec, LayerCache
from model.deepseek_v4.config import CSA_RATIO


class KVCachePool:
    """Pools, rings, states and tails of every layer.

    Args:
        spec: sizes.
        num_blocks: logical blocks of the world.
        num_slots, num_tails: rows of per-request state, and of saved state.
        device: where the tensors live.
        streams_dtype: dtype of residual streams (kept for MTP).
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        num_blocks: int,
        num_slots: int,
        num_tails: int,
        device: torch.device,
        streams_dtype: torch.dtype,
    ) -> None:
        self.spec, self.device = spec, device
        self.num_blocks, self.num_slots, self.num_tails = num_blocks, num_slots, num_tails
        self.layers = [
            LayerCache.allocate(
                spec,
                layer,
                num_blocks=num_blocks,
                num_slots=num_slots,
                num_tails=num_tails,
                device=device,
            )
            for layer in range(len(spec.ratios))
        ]
        self.stream_rows = spec.max_drafts + 1
        width = spec.streams_width if spec.with_mtp else 0

        def streams(rows: int) -> Tensor:
            return torch.zeros(rows, width, dtype=streams_dtype, device=device)

        self.streams = streams(num_slots * self.stream_rows)
        self.tail_streams = streams(num_tails)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated."""
        own = self.streams.nbytes + self.tail_streams.nbytes
        return own + sum(layer.nbytes for layer in self.layers)

    @property
    def mtp(self) -> LayerCache:
        """The MTP block's cache (the last layer; only with_mtp)."""
        return self.layers[-1]

    def window_rows(self, slot: int, positions: np.ndarray) -> np.ndarray:
        """Flat window ring rows of a slot's positions, int64."""
        ring = self.spec.ring_rows
        return slot * ring + positions % ring

    def state_rows(self, ratio: int, slot: int, positions: np.ndarray) -> np.ndarray:
        """Flat compressor state rows of a slot's positions, int64."""
        ring = self.spec.state_rows(ratio)
        return slot * ring + positions % ring

    def stream_row(self, slot: int, position: int) -> int:
        """Row of ``streams`` that holds a position's residual streams after a decode step."""
        return slot * self.stream_rows + position % self.stream_rows

    def tail_window_rows(self, tail: int) -> np.ndarray:
        """Flat rows of a tail's window latents, for positions B - (window - 1) .. B - 1."""
        rows = self.spec.tail_rows
        return np.arange(tail * rows, (tail + 1) * rows, dtype=np.int64)

    def tail_state_rows(self, tail: int) -> np.ndarray:
        """Flat rows of a tail's CSA state, for positions B - 4 .. B - 1."""
        return np.arange(tail * CSA_RATIO, (tail + 1) * CSA_RATIO, dtype=np.int64)

    def save_tail(self, slot: int, position: int, tail: int) -> None:
        """Copy a slot's state at a block boundary into a tail; the ring must still hold it."""
        self._copy(slot, position, tail, save=True)
        if self.spec.with_mtp:
            self.tail_streams[tail] = self.streams[self.stream_row(slot, position - 1)]

    def restore_tail(self, slot: int, position: int, tail: int) -> None:
        """Make a slot continue at ``position`` from a tail."""
        self._copy(slot, position, tail, save=False)

    def _copy(self, slot: int, position: int, tail: int, *, save: bool) -> None:
        if position % self.spec.block_size or position <= 0:
            raise ValueError(
                f"tail position {position}, allowed: multiples of {self.spec.block_size}"
            )
        window = np.arange(position - self.spec.tail_rows, position, dtype=np.int64)
        ring = self._index(self.window_rows(slot, window))
        kept = self._index(self.tail_window_rows(tail))
        group = np.arange(position - CSA_RATIO, position, dtype=np.int64)
        state = self._index(self.state_rows(CSA_RATIO, slot, group))
        kept_state = self._index(self.tail_state_rows(tail))
        for layer in self.layers:
            # float32 holds every storage format exactly.
            if save:
                rows = load_entries(layer.window, layer.window_layout, ring, torch.float32)
                store_entries(layer.tail_window, layer.tail_layout, kept, rows)
            else:
                rows = load_entries(layer.tail_window, layer.tail_layout, kept, torch.float32)
                store_entries(layer.window, layer.window_layout, ring, rows)
            if layer.ratio != CSA_RATIO:
                continue
            if save:
                layer.tail_state[kept_state] = layer.state[state]
            else:
                layer.state[state] = layer.tail_state[kept_state]

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.device)
