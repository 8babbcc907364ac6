"""Where the torch twin of ``sparse_attention`` gets its keys from, one chunk of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.contract import KernelContractError
from kernels.numerics import wide_dtype, widen
from kernels.page_cache.reference import load_entries, load_sequence
from kernels.sparse_attention.api import EntryPages, WindowRing, WindowRows

_GATHER_COST = 32  # what gathering a key costs, in heads that could read it (measured on a CPU)
_CACHED_VALUES = 1 << 26  # f32 values of one sequence's entries kept decoded at once (256 MB)


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of a chunk of R queries: f32 or f64 rows, shared [M, d] or per query [R, M, d]; bool [R, M]."""

    rows: Tensor
    mask: Tensor

    @property
    def shared(self) -> bool:
        """Whether all queries of the chunk read the same rows, each through its mask."""
        return self.rows.dim() == 2

    def select(self, row: int) -> Keys:
        """The keys of one query, with rows it does not use set to zero (they may hold NaN)."""
        mask = self.mask[row : row + 1]
        if not self.shared:
            return Keys(self.rows[row : row + 1], mask)
        return Keys(self.rows.masked_fill(~mask[0, :, None], 0.0), mask)


class KeySource(Protocol):
    """Keys of any range of query rows, and what they cost."""

    def width(self) -> int:
        """Upper bound of keys per query in a shared or gathered chunk."""

    def values_per_row(self) -> int:
        """f32 values gathered for each query; 0 when rows are shared."""

    def keys(self, start: int, stop: int) -> Keys:
        """Keys of query rows ``start:stop``."""


class WindowRowKeys:
    """``WindowRows``: neighbouring queries share a span; scattered ones gather."""

    def __init__(self, window: WindowRows) -> None:
        self.window = window
        self.longest = _maximum(window.length)
        if window.kv.device.type != "cpu" or not window.length.numel():
            return
        used = window.length > 0
        starts, stops = window.start[used], (window.start + window.length)[used]
        if bool((starts < 0).any()) or _maximum(stops) > window.kv.shape[0]:
            raise KernelContractError(
                f"sparse_attention: window rows {int(starts.min())}..{_maximum(stops) - 1}"
                f" reach outside kv, allowed: 0..{window.kv.shape[0] - 1}"
            )

    def width(self) -> int:
        return 2 * self.longest

    def values_per_row(self) -> int:
        return 0

    def keys(self, start: int, stop: int) -> Keys:
        kv, longest = self.window.kv, self.longest
        first, length = self.window.start[start:stop], self.window.length[start:stop]
        used = length > 0
        low = int(torch.where(used, first, kv.shape[0]).min())
        high = _maximum(torch.where(used, first + length, 0))
        if high - low <= 2 * longest + (stop - start):
            column = torch.arange(low, max(low, high), device=kv.device)
            mask = (column >= first[:, None]) & (column < (first + length)[:, None])
            return Keys(widen(kv[low : max(low, high)]).contiguous(), mask)
        column = torch.arange(longest, device=kv.device)
        mask = column < length[:, None]
        index = torch.where(mask, first[:, None] + column, 0)
        rows = widen(kv[index])
        return Keys(rows.masked_fill_(~mask[..., None], 0.0), mask)


class RingKeys:
    """``WindowRing``: gathered per query."""

    def __init__(self, ring: WindowRing, dtype: torch.dtype) -> None:
        self.ring, self.dtype = ring, dtype

    def width(self) -> int:
        return self.ring.slots.shape[1]

    def values_per_row(self) -> int:
        return self.width() * self.ring.layout.head_dim

    def keys(self, start: int, stop: int) -> Keys:
        slots = self.ring.slots[start:stop]
        rows = load_entries(self.ring.pool, self.ring.layout, slots.reshape(-1), self.dtype)
        return Keys(widen(rows).view(*slots.shape, rows.shape[-1]), slots >= 0)


class GatheredEntryKeys:
    """``EntryPages`` read entry by entry from the pool: few queries per sequence, or long ones."""

    def __init__(self, entries: EntryPages, dtype: torch.dtype) -> None:
        self.entries, self.dtype = entries, dtype
        self.most = _maximum(entries.num_entries)

    def width(self) -> int:
        index = self.entries.index
        return self.most if index is None else index.shape[1]

    def values_per_row(self) -> int:
        return self.width() * self.entries.layout.head_dim

    def keys(self, start: int, stop: int) -> Keys:
        e = self.entries
        seq, limit = e.row_seq[start:stop, None], e.num_entries[start:stop, None]
        if e.index is None:
            entry = torch.arange(self.most, device=seq.device).expand(stop - start, -1)
        else:
            entry = e.index[start:stop].to(torch.int64)
        mask = (entry >= 0) & (entry < limit) & (seq >= 0)
        per_page = e.layout.entries_per_page
        block = torch.where(mask, torch.div(entry, per_page, rounding_mode="floor"), 0)
        if (
            seq.device.type == "cpu"
            and bool(mask.any())
            and _maximum(block) >= e.block_table.shape[1]
        ):
            raise KernelContractError(
                f"sparse_attention: entry {_maximum(entry)} lies in block {_maximum(block)},"
                f" the block table holds {e.block_table.shape[1]}"
            )
        if not bool(mask.any()):
            wide = wide_dtype(self.dtype)
            rows = torch.zeros(*mask.shape, e.layout.head_dim, dtype=wide, device=seq.device)
            return Keys(rows, mask)
        page = e.block_table[seq.clamp(min=0), block].to(torch.int64)
        mask = mask & (page >= 0)
        slots = torch.where(mask, page * per_page + entry % per_page, -1)
        rows = load_entries(e.pool, e.layout, slots.reshape(-1), self.dtype)
        return Keys(widen(rows).view(*slots.shape, rows.shape[-1]), mask)


class SequenceEntryKeys:
    """``EntryPages`` of one sequence, decoded once for all its queries ``start:stop``."""

    def __init__(
        self, entries: EntryPages, dtype: torch.dtype, heads: int, seq: int, start: int, stop: int
    ) -> None:
        self.entries = entries
        count = max(0, _maximum(entries.num_entries[start:stop])) if seq >= 0 else 0
        table = entries.block_table[max(seq, 0)] if count else entries.block_table.new_empty(0)
        rows, self.present = load_sequence(entries.pool, entries.layout, table, count, dtype)
        self.rows, self.count = widen(rows), count
        index = entries.index
        # A masked product over all entries beats a gather while heads are few or most are chosen.
        self.dense = index is None or count * heads <= index.shape[1] * (heads + _GATHER_COST)

    @staticmethod
    def fits(entries: EntryPages, start: int, stop: int) -> bool:
        """Whether the sequence's entries are few enough to be kept decoded."""
        count = _maximum(entries.num_entries[start:stop])
        return entries.index is None or count * entries.layout.head_dim <= _CACHED_VALUES

    def width(self) -> int:
        index = self.entries.index
        return self.count if self.dense or index is None else index.shape[1]

    def values_per_row(self) -> int:
        return 0 if self.dense else self.width() * self.entries.layout.head_dim

    def keys(self, start: int, stop: int) -> Keys:
        limit = self.entries.num_entries[start:stop, None]
        index = self.entries.index
        if index is None:
            count = min(self.count, max(0, _maximum(limit)))
            column = torch.arange(count, device=limit.device)
            return Keys(self.rows[:count], (column < limit) & self.present[:count])
        entry = index[start:stop].to(torch.int64)
        wanted = (entry >= 0) & (entry < limit)
        if self.count == 0:
            return Keys(
                self.rows, torch.zeros(stop - start, 0, dtype=torch.bool, device=limit.device)
            )
        if self.dense:
            count = min(self.count, max(0, _maximum(limit)))
            target = torch.where(wanted, entry, count)
            mask = torch.zeros(stop - start, count + 1, dtype=torch.bool, device=limit.device)
            mask.scatter_(1, target, True)
            return Keys(self.rows[:count], mask[:, :count] & self.present[:count])
        safe = torch.where(wanted, entry, 0)
        mask = wanted & self.present[safe]
        rows = self.rows.index_select(0, safe.reshape(-1)).view(*safe.shape, -1)
        if not bool(mask.all()):
            rows.masked_fill_(~mask[..., None], 0.0)
        return Keys(rows, mask)


def _maximum(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0
