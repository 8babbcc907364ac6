"""What a V4 model stores per token and per request: every size, stride and ring length.

Pure arithmetic, used by the worker (allocation), `check` and `plan` (memory). Nobody else divides a
block size by a compression ratio.

Per layer, by ratio:

* every layer: a *window ring* of ``ring_rows`` latents per slot, row = position mod ring_rows;
* ratio 4 (CSA): main pages and index pages of ``block_size // 4`` entries, and a compressor state ring of
  16 rows holding ``u, g`` of the main and of the indexer compressor;
* ratio 128 (HCA): main pages of ``block_size // 128`` entries and a state ring of 256 rows.

State rows are position-addressed (row = position mod rows), so a rejected draft is undone by writing the
right row over it. A *tail* is the state at a block boundary: the last window - 1 latents of every layer
and, for CSA, the state rows of the group before the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.page_layout import CacheDtype, EntryKind, PageLayout
from model.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config
from model.parallel.config import ParallelConfig

BLOCK_MULTIPLE = HCA_RATIO  # a block must end every group of every layer
_STATE_ROWS = {
    CSA_RATIO: 16,
    HCA_RATIO: 256,
}  # two periods of what pooling reads: room for rollback


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Sizes of all caches of one model; bytes are per rank.

    Args:
        config: the model's shape.
        dtype: storage format of latents and index keys.
        block_size: tokens per logical block, a multiple of 128.
        max_drafts: MTP drafts per step; the rings keep that many rows more.
        with_mtp: whether the MTP block's ring exists.
        parallel: mesh sizes (``kv_shard: cp`` divides the main pages).

    Raises:
        ValueError: block_size is not a positive multiple of 128, or max_drafts not in 0..3.
    """

    config: DeepSeekV4Config
    dtype: CacheDtype
    block_size: int
    max_drafts: int
    with_mtp: bool
    parallel: ParallelConfig

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size % BLOCK_MULTIPLE:
            raise ValueError(
                f"kv_cache.block_size = {self.block_size}, allowed: a positive multiple of {BLOCK_MULTIPLE}"
            )
        if not 0 <= self.max_drafts <= 3:
            raise ValueError(f"speculative.mtp = {self.max_drafts}, allowed: 0..3")

    @property
    def ratios(self) -> tuple[int, ...]:
        """Compression ratio of every cached layer; the MTP block, when present, is the last."""
        return self.config.compress_ratios + ((0,) if self.with_mtp else ())

    @property
    def ring_rows(self) -> int:
        """Window ring length: the window plus the rows a verify step may write ahead.

        The MTP block writes further: after accepting d drafts of a step that began at p, its own
        drafts reach p + 2d - 1, and a tail saved then at p + 1 still needs the row at p + 2 - window.
        """
        d = self.max_drafts
        return self.config.sliding_window + max(d, 2 * d - 2)

    @property
    def tail_rows(self) -> int:
        """Window rows in a tail."""
        return self.config.sliding_window - 1

    @property
    def window_layout(self) -> PageLayout:
        """One page = one slot's ring in one layer."""
        return self._latent(self.ring_rows)

    @property
    def tail_layout(self) -> PageLayout:
        """One page = one tail's window rows in one layer."""
        return self._latent(max(self.tail_rows, 1))

    def storage_block_size(self, ratio: int) -> int:
        """Entries of a logical block in a layer of this ratio."""
        return self.block_size // ratio

    def main_layout(self, ratio: int) -> PageLayout:
        """Pages of compressed latents."""
        return self._latent(self.storage_block_size(ratio))

    @property
    def index_layout(self) -> PageLayout:
        """Pages of indexer keys (CSA layers)."""
        return PageLayout(
            kind=EntryKind.INDEX,
            dtype=self.dtype,
            head_dim=self.config.index_head_dim,
            rope_dim=0,
            entries_per_page=self.storage_block_size(CSA_RATIO),
        )

    def _latent(self, entries: int) -> PageLayout:
        return PageLayout(
            kind=EntryKind.LATENT,
            dtype=self.dtype,
            head_dim=self.config.head_dim,
            rope_dim=self.config.qk_rope_head_dim,
            entries_per_page=entries,
        )

    @staticmethod
    def state_rows(ratio: int) -> int:
        """Rows of a compressor state ring."""
        return _STATE_ROWS[ratio]

    def state_width(self, ratio: int) -> int:
        """float32 values of a state row: u and g of the main compressor, then of the indexer's."""
        if ratio == HCA_RATIO:
            return 2 * self.config.head_dim
        return 4 * self.config.head_dim + 4 * self.config.index_head_dim

    @property
    def streams_width(self) -> int:
        """Values of one token's residual streams, kept for MTP."""
        return self.config.hc_mult * self.config.hidden_size

    def local_blocks(self, num_blocks: int) -> int:
        """Main pages per layer on one rank for ``num_blocks`` logical blocks in the world."""
        if self.parallel.kv_shard == "replicate":
            return num_blocks
        return -(-num_blocks // self.parallel.cp)

    def main_block_bytes(self) -> int:
        """Bytes of one block's main pages, all layers."""
        return sum(self.main_layout(r).page_bytes for r in self.ratios if r)

    def index_block_bytes(self) -> int:
        """Bytes of one block's index pages, all layers."""
        return self.index_layout.page_bytes * self.ratios.count(CSA_RATIO)

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of all paged pools for ``num_blocks`` logical blocks."""
        return (
            self.local_blocks(num_blocks) * self.main_block_bytes()
            + num_blocks * self.index_block_bytes()
        )

    def slot_bytes(self, streams_itemsize: int) -> int:
        """Bytes of one slot: rings of every layer, and the streams ring for MTP."""
        states = sum(4 * self.state_rows(r) * self.state_width(r) for r in self.ratios if r)
        streams = (self.max_drafts + 1) * self.streams_width * streams_itemsize
        rings = len(self.ratios) * self.window_layout.page_bytes
        return rings + states + (streams if self.with_mtp else 0)

    def tail_bytes(self, streams_itemsize: int) -> int:
        """Bytes of one tail."""
        windows = len(self.ratios) * self.tail_layout.page_bytes
        states = self.ratios.count(CSA_RATIO) * 4 * CSA_RATIO * self.state_width(CSA_RATIO)
        streams = self.streams_width * streams_itemsize if self.with_mtp else 0
        return windows + states + streams

    def blocks_that_fit(self, pool_bytes: int) -> int:
        """Most logical blocks whose pools fit into ``pool_bytes`` on every rank."""
        shards = 1 if self.parallel.kv_shard == "replicate" else self.parallel.cp
        per_shard_row = self.main_block_bytes() + shards * self.index_block_bytes()
        if per_shard_row == 0:  # sliding-window layers only: blocks cost nothing
            return 1 << 16
        return pool_bytes // per_shard_row * shards


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Live tensors of one layer; allocated by the worker, read and written by attention.

    ``window`` uint8 [slots, page_bytes]; ``main`` uint8 [local blocks, page_bytes]; ``index`` uint8
    [blocks, page_bytes]; ``state`` float32 [slots * state_rows, width]; ``tail_window`` uint8
    [tails, page_bytes]; ``tail_state`` float32 [tails * 4, width]. What a layer's ratio does not have
    is an empty tensor.
    """

    ratio: int
    window: Tensor
    window_layout: PageLayout
    tail_window: Tensor
    tail_layout: PageLayout
    main: Tensor
    main_layout: PageLayout
    index: Tensor
    index_layout: PageLayout
    state: Tensor
    tail_state: Tensor

    @classmethod
    def allocate(
        cls,
        spec: CacheSpec,
        layer: int,
        *,
        num_blocks: int,
        num_slots: int,
        num_tails: int,
        device: torch.device,
    ) -> LayerCache:
        """Allocate one layer's caches, zero-filled; see the class for shapes."""
        ratio = spec.ratios[layer]
        csa = ratio == CSA_RATIO
        main_layout = spec.main_layout(ratio or HCA_RATIO)

        def pages(count: int, layout: PageLayout) -> Tensor:
            return torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=device)

        def states(count: int, rows: int) -> Tensor:
            width = spec.state_width(ratio) if ratio else 0
            return torch.zeros(count * rows, width, dtype=torch.float32, device=device)

        return cls(
            ratio=ratio,
            window=pages(num_slots, spec.window_layout),
            window_layout=spec.window_layout,
            tail_window=pages(num_tails, spec.tail_layout),
            tail_layout=spec.tail_layout,
            main=pages(spec.local_blocks(num_blocks) if ratio else 0, main_layout),
            main_layout=main_layout,
            index=pages(num_blocks if csa else 0, spec.index_layout),
            index_layout=spec.index_layout,
            state=states(num_slots, spec.state_rows(ratio)) if ratio else states(0, 0),
            tail_state=states(num_tails if csa else 0, CSA_RATIO),
        )

    @property
    def nbytes(self) -> int:
        """Bytes really allocated."""
        tensors = (
            self.window,
            self.tail_window,
            self.main,
            self.index,
            self.state,
            self.tail_state,
        )
        return sum(t.nbytes for t in tensors)
