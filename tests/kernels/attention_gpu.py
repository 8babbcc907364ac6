"""Random paged caches on the GPU for the tests and benchmarks of the attention ops."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, EntryPages, PageLayout, WindowRing, WindowRows
from kernels.page_cache import reference as pages


def layout(kind: EntryKind, dtype: CacheDtype, per_page: int) -> PageLayout:
    """V4's entries: 448 + 64 latent values, 128 index values."""
    latent = kind is EntryKind.LATENT
    return PageLayout(
        kind=kind,
        dtype=dtype,
        head_dim=512 if latent else 128,
        rope_dim=64 if latent else 0,
        entries_per_page=per_page,
    )


def random_pool(shape: PageLayout, count: int, pad: int = 0) -> Tensor:
    """``count`` pages of random entries; bytes around them are NaN patterns."""
    raw = torch.full((count, shape.page_bytes + pad), 0xFF, dtype=torch.uint8, device="cuda")
    pool = raw[:, : shape.page_bytes]
    slots = torch.arange(count * shape.entries_per_page, device="cuda")
    for part in slots.split(1 << 16):
        rows = torch.randn(len(part), shape.head_dim, device="cuda")
        rows *= torch.exp2(torch.randint(-2, 3, (len(part), 1), device="cuda").float())
        pages.store_entries(pool, shape, part, rows.to(torch.bfloat16))
    return pool


def random_table(seqs: int, blocks: int, pages_in_pool: int, holes: bool = False) -> Tensor:
    """Scattered pages; with ``holes`` some blocks live elsewhere (-1)."""
    table = torch.randperm(pages_in_pool, device="cuda")[: seqs * blocks].view(seqs, blocks)
    table = table.to(torch.int32)
    if holes:
        table[torch.rand(seqs, blocks, device="cuda") < 0.2] = -1
    return table.contiguous()


def random_entries(
    rows: int,
    *,
    seqs: int,
    blocks: int,
    per_page: int,
    topk: int | None,
    dtype: CacheDtype = CacheDtype.FP8,
    full: bool = False,
    holes: bool = False,
    pad: int = 0,
) -> EntryPages:
    """Entries of ``rows`` queries; ``full``: every query sees all, else any number."""
    shape = layout(EntryKind.LATENT, dtype, per_page)
    count, capacity = seqs * blocks + 2, blocks * per_page
    seq = torch.arange(rows, device="cuda") * seqs // max(rows, 1)
    limit = torch.full((rows,), capacity, device="cuda")
    index = None
    if not full:
        limit = torch.randint(0, capacity + 1, (rows,), device="cuda")
        limit[::5] = 0
        seq[::7] = -1
    if topk is not None:
        order = torch.rand(rows, capacity, device="cuda").argsort(dim=1)[:, :topk]
        index = torch.full((rows, topk), -1, dtype=torch.int32, device="cuda")
        index[:, : order.shape[1]] = order.to(torch.int32)
        if not full:
            index[torch.rand(rows, topk, device="cuda") < 0.1] = -1
    return EntryPages(
        pool=random_pool(shape, count, pad),
        layout=shape,
        block_table=random_table(seqs, blocks, count, holes),
        row_seq=seq,
        index=index,
        num_entries=limit,
    )


def random_ring(rows: int, width: int, dtype: CacheDtype, full: bool = False) -> WindowRing:
    """Slots in a pool of rings, some absent unless ``full``."""
    shape = layout(EntryKind.LATENT, dtype, 132)
    count = max(2, rows)
    slots = torch.rand(rows, 132, device="cuda").argsort(dim=1)[:, :width]
    slots = slots + torch.arange(rows, device="cuda")[:, None] * 132
    if not full:
        slots[torch.rand(rows, width, device="cuda") < 0.2] = -1
    return WindowRing(pool=random_pool(shape, count), layout=shape, slots=slots)


def causal_rows(rows: int, width: int, before: int = 0) -> WindowRows:
    """Every query sees up to ``width`` rows up to its own."""
    at = torch.arange(rows, device="cuda") + before
    start = (at - width + 1).clamp(min=0)
    kv = torch.randn(rows + before, 512, device="cuda").to(torch.bfloat16)
    return WindowRows(kv=kv, start=start, length=at + 1 - start)


def error(got: Tensor, want: Tensor) -> float:
    """Norm-wise relative error; infinite where one has a value and the other has none."""
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return float("inf")
    difference, scale = (got - want)[finite].norm(), want[finite].norm()
    return float(difference / scale) if float(scale) else float(difference)
