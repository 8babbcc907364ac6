"""Byte layout of cached entries: the one place that knows sizes, strides and alignment.

A *page* holds ``entries_per_page`` entries of one layer. A pool is a uint8 tensor
``[num_pages, page_bytes]``. FP8 pages keep all payloads first, then all scales, then padding:

    page = [n * payload bytes][n * scale bytes][pad to the alignment]

Latent entry (fp8): ``d - rope`` e4m3 bytes, ``rope`` bf16 values, then (in the scale area) one E8M0
byte per 64 e4m3 values, padded to a multiple of 8. With d = 512 this is the 584-byte entry.
Index entry (fp8): ``d`` e4m3 bytes and one f32 power-of-two scale: 132 bytes with d = 128.
bf16 and fp32 entries are plain rows without scales.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

QUANT_BLOCK = 64  # values per E8M0 scale of a latent entry


class CacheDtype(enum.Enum):
    """Storage format of cached entries (``kv_cache.dtype`` without ``auto``)."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"


class EntryKind(enum.Enum):
    """What an entry holds: a KV latent (window, CSA, HCA) or an indexer key."""

    LATENT = "latent"
    INDEX = "index"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Sizes and offsets of a page, in bytes.

    Args:
        kind: latent or index entries.
        dtype: storage format.
        head_dim: values per entry.
        rope_dim: trailing values of a latent entry that stay bf16 in fp8 pages; 0 for index entries.
        entries_per_page: entries in a page (``storage_block_size``, or the ring length for rings).
    """

    kind: EntryKind
    dtype: CacheDtype
    head_dim: int
    rope_dim: int
    entries_per_page: int

    def __post_init__(self) -> None:
        if self.entries_per_page < 1 or self.head_dim < 1:
            raise ValueError(
                f"page layout: entries_per_page {self.entries_per_page} and head_dim"
                f" {self.head_dim} must be >= 1"
            )
        if (
            self.dtype is CacheDtype.FP8
            and self.kind is EntryKind.LATENT
            and self.nope_dim % QUANT_BLOCK
        ):
            raise ValueError(
                f"page layout: fp8 latent entries need (head_dim - rope_dim) % {QUANT_BLOCK} == 0,"
                f" got {self.head_dim} - {self.rope_dim}"
            )

    @property
    def nope_dim(self) -> int:
        """Leading values of a latent entry, stored as e4m3 in fp8 pages."""
        return self.head_dim - self.rope_dim

    @property
    def payload_bytes(self) -> int:
        """Bytes of one entry's values."""
        if self.dtype is CacheDtype.FP32:
            return 4 * self.head_dim
        if self.dtype is CacheDtype.BF16:
            return 2 * self.head_dim
        if self.kind is EntryKind.INDEX:
            return self.head_dim
        return self.nope_dim + 2 * self.rope_dim

    @property
    def scale_bytes(self) -> int:
        """Bytes of one entry's scales, padding included; 0 for plain rows."""
        if self.dtype is not CacheDtype.FP8:
            return 0
        if self.kind is EntryKind.INDEX:
            return 4
        return -(-(self.nope_dim // QUANT_BLOCK) // 8) * 8

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry, page padding excluded (584 and 132 for V4)."""
        return self.payload_bytes + self.scale_bytes

    @property
    def alignment(self) -> int:
        """Page size granularity: 576 for fp8 latents and fp8 indices (as vLLM), 512 for plain rows."""
        return 576 if self.dtype is CacheDtype.FP8 else 512

    @property
    def scale_offset(self) -> int:
        """Byte offset of the scale area inside a page."""
        return self.entries_per_page * self.payload_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, padded to ``alignment``."""
        used = self.entries_per_page * self.entry_bytes
        return -(-used // self.alignment) * self.alignment
