"""``sparse_attention`` in decode by FlashMLA (package ``sglang-kernel``), else by the own kernels.

FlashMLA reads the same fp8 pages: the ring as its cache, the compressed entries as its extra cache,
both through int32 slots that one small kernel makes from the op's tables. It serves the calls that
``serves`` names. How it splits a row's keys depends on the batch: a row's bits do too. That split (its
"scheduler metadata") follows from the sizes alone and is kept for each.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import FLASH_MLA
from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.page_layout import CacheDtype, PageLayout
from kernels.sparse_attention import cuda_impl
from kernels.sparse_attention.api import EntryPages, WindowRing, WindowRows

_SOURCE = Path(__file__).parent / "flash_mla" / "slots.cu"
_LIBRARY = "sgl_kernel/flashmla_ops.abi3.so"
# Heads it is compiled for -> rows from which on it was faster than the own kernel on an H200, slots and
# all (2026-11-21, benchmarks/flash_mla.py): 64 heads, 512 chosen entries, 128 / 256 / 1024 rows 53.1 /
# 94.2 / 344 us against 50.8 / 97.3 / 354; 128 heads, 1024 chosen, 32 / 64 / 256 rows 55.3 / 64.3 / 218
# against 45.7 / 90.1 / 335.
FASTER_FROM = {64: 256, 128: 64}
_TILE = 64  # keys; lists of slots are whole tiles
_SLOTS = 1 << 31  # slots are int32
# (device, rows, heads, slots of the ring, of the entries) -> how FlashMLA splits such a step
_PLANS: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

with FLASH_MLA.named(f"loading {_LIBRARY}"):
    torch.ops.load_library(str(FLASH_MLA.file(_LIBRARY)))  # type: ignore[no-untyped-call]


def build() -> None:
    """Compile the own kernels and the one that makes slots; FlashMLA itself is compiled already."""
    cuda_impl.build()
    load_library(_SOURCE)


def serves(
    q: Tensor, window: WindowRows | WindowRing | None, entries: EntryPages | None, scale: float
) -> bool:
    """Whether a call goes to FlashMLA: a decode that it takes, where it was measured to be faster."""
    if isinstance(window, WindowRows) or entries is None or entries.index is None or not scale > 0:
        return False
    rows, heads, dim = q.shape
    sources: list[WindowRing | EntryPages] = [entries]
    if window is not None:
        sources.append(window)
    return (
        q.dtype is torch.bfloat16
        and dim == 512
        and rows >= FASTER_FROM.get(heads, rows + 1)
        and all(_readable(x.pool, x.layout) and _width(x) > 0 for x in sources)
    )


def sparse_attention(
    q: Tensor,
    window: WindowRows | WindowRing | None,
    entries: EntryPages | None,
    *,
    sink: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.sparse_attention.api.sparse_attention``."""
    if isinstance(window, WindowRows) or not serves(q, window, entries, scale):
        return cuda_impl.sparse_attention(q, window, entries, sink=sink, scale=scale)
    rows, heads, dim = q.shape
    ring_slots, entry_slots = _slots(rows, window, entries, q.device)
    parts = []
    if window is not None:
        parts.append((pages(window.pool, window.layout), ring_slots))
    if entries is not None:
        parts.append((pages(entries.pool, entries.layout), entry_slots))
    cache, extra = parts[0], parts[1] if len(parts) > 1 else (None, None)
    key = (q.device.index, rows, heads, ring_slots.shape[2], entry_slots.shape[2])
    known = _PLANS.get(key, (None, None))
    with FLASH_MLA.named("sparse_decode_fwd"):
        o, lse, *plan = torch.ops.sgl_kernel.sparse_decode_fwd.default(
            q.contiguous()[:, None], *cache, None, sink, *known, *extra, None, dim, scale
        )
    if key not in _PLANS and not torch.cuda.is_current_stream_capturing():
        _PLANS[key] = (plan[0], plan[1])
    # It reports +inf for a row without keys, whose result it leaves zero.
    nan, least = float("nan"), float("-inf")
    lse = lse.view(rows, heads).nan_to_num_(nan=nan, posinf=least, neginf=least)
    return o.view(rows, heads, dim), lse


def _slots(
    rows: int, window: WindowRing | None, entries: EntryPages | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Slots of the ring [T, 1, W'] and of the entries [T, 1, K'], whole tiles of them."""
    wide, count = (0 if x is None else _width(x) for x in (window, entries))
    ring = torch.empty(rows, 1, -(-wide // _TILE) * _TILE, dtype=torch.int32, device=device)
    chosen = torch.empty(rows, 1, -(-count // _TILE) * _TILE, dtype=torch.int32, device=device)
    slots = None if window is None else window.slots
    index = table = seq = limit = None
    per_page = 1
    if entries is not None:
        index, table, per_page = entries.index, entries.block_table, entries.layout.entries_per_page
        seq, limit = entries.row_seq, entries.num_entries
    code = _library().causeway_decode_slots(
        *(pointer(slots), 0 if slots is None else slots.stride(0), wide, pointer(ring)),
        *(ring.shape[2], pointer(index), 0 if index is None else index.stride(0), count),
        *(pointer(seq), pointer(limit), pointer(table), 0 if table is None else table.stride(0)),
        *(per_page, pointer(chosen), chosen.shape[2], rows, stream(ring)),
    )
    check_launch("sparse_attention: slots", code)
    return ring, chosen


def _width(keys: WindowRing | EntryPages) -> int:
    """Keys that a row may have; 0 for all entries of a sequence, which FlashMLA would walk one by one."""
    if isinstance(keys, WindowRing):
        return keys.slots.shape[1]
    return 0 if keys.index is None else keys.index.shape[1]


def _readable(pool: Tensor, layout: PageLayout) -> bool:
    return (
        layout.dtype is CacheDtype.FP8
        and (layout.head_dim, layout.rope_dim) == (512, 64)
        and 0 < pool.shape[0] * layout.entries_per_page < _SLOTS
        and pool.data_ptr() % 16 == 0
        and pool.stride(0) % layout.alignment == 0
    )


def pages(pool: Tensor, layout: PageLayout) -> Tensor:
    """The pool as [pages, entries, 1, bytes]; its strides say where pages start, no more."""
    entry = layout.entry_bytes
    return pool.as_strided(
        (pool.shape[0], layout.entries_per_page, 1, entry), (pool.stride(0), entry, entry, 1)
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_library(_SOURCE)
    address, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.causeway_decode_slots.argtypes = (
        *(address, wide, number, address, number, address, wide, number),
        *(address, address, address, wide, number, address, number, number, address),
    )
    return library
