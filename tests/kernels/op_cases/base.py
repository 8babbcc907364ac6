"""What a case of an op is, and the tensors that cases are made of.

A case makes random arguments for any number of rows and calls the op on them. Arguments that belong
to a row (its values, position, slot, sequence) are kept apart from those that all rows share
(weights, pages), so that a test can give the op any rows in any order beside any neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kernels
from kernels import BlockWeight, CacheDtype, EntryKind, PageLayout, dispatch
from kernels.backend import Backend
from kernels.page_cache import reference as pages
from kernels.quant.reference import pack_fp4, quant_fp8_weight

BF16 = torch.bfloat16
EPS = 1e-6
Rows = dict[str, Tensor]
Op = Callable[..., Any]
Call = Callable[[Op, Rows], tuple[Tensor, ...]]
Make = Callable[[int, torch.device, torch.dtype], "Inputs"]
FAR = 1 << 27  # bytes between far pages: twenty of them reach beyond 2^31


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Arguments for a batch.

    Args:
        rows: tensors with one line per row.
        call: runs the op that it is given on such rows; every result has one line per row. A bool
            result is a claim: it must be true.
    """

    rows: Rows
    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one shape.

    Args:
        op: name in the dispatch table.
        name: the shape, in a word or two.
        make: ``(rows, device, dtype of the streams)`` -> arguments.
        bound: norm-wise error that is allowed against the float64 twin; None: see ``proof``.
        proof: the test file that compares with the twin where this table does not.
        no_graph: why a CUDA graph cannot capture the op; empty where it can.
        big: tested with more than 2^31 elements, or with 70,000 rows where that is too much memory.
        cpu: small enough for a test of the twin on a CPU.
        gpu: False for shapes that no kernel takes: the torch twin runs them also on a GPU, and its sums
            may depend on the batch.
    """

    op: str
    name: str
    make: Make
    bound: float | None = None
    proof: str = ""
    no_graph: str = ""
    big: bool = False
    cpu: bool = False
    gpu: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.name.replace(' ', '_')}"


def public(op: str) -> Op:
    """The op as everyone calls it."""
    function: Op = getattr(kernels, op)
    return function


@contextmanager
def own_kernels() -> Iterator[None]:
    """Inside, no optional backend serves an op, installed or not: this project's kernels do."""
    caches = (dispatch._table, dispatch._function)
    with mock.patch.object(Backend, "usable", return_value=False):
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values whose rows differ in size by powers of two."""
    out = torch.randn(*shape, device=device)
    size = torch.randint(-3, 4, (shape[0], *[1] * (len(shape) - 1)), device=device)
    return (out * torch.exp2(size)).to(dtype)


def positions(device: torch.device, count: int) -> Tensor:
    """Positions up to a million."""
    return torch.randint(0, 1 << 20, (count,), device=device)


def frequencies(device: torch.device, rope_dim: int = 64) -> Tensor:
    """RoPE frequencies."""
    exponent = torch.arange(0, rope_dim, 2, device=device, dtype=torch.float32) / rope_dim
    return 1.0 / 10000.0**exponent


def norm_weight(device: torch.device, dim: int) -> Tensor:
    """A norm weight near one."""
    return 1.0 + 0.1 * torch.randn(dim, device=device)


def fp8_weight(device: torch.device, n: int, k: int) -> BlockWeight:
    """A random FP8 weight."""
    data, scale = quant_fp8_weight(torch.randn(n, k, device=device) * 0.02)
    return BlockWeight(data, scale)


def fp4_weight(device: torch.device, n: int, k: int) -> BlockWeight:
    """A random FP4 weight."""
    data, scale = pack_fp4(torch.randn(n, k, device=device) * 0.02)
    return BlockWeight(data, scale)


def layout(kind: EntryKind, dtype: CacheDtype, per_page: int, dim: int, rope: int) -> PageLayout:
    """Pages of latent or index entries."""
    return PageLayout(
        kind=kind,
        dtype=dtype,
        head_dim=dim,
        rope_dim=rope if kind is EntryKind.LATENT else 0,
        entries_per_page=per_page,
    )


def empty_pool(device: torch.device, shape: PageLayout, count: int, far: bool = False) -> Tensor:
    """Pages of NaN bytes with NaN bytes between them; ``far``: beyond 2^31 bytes."""
    gap = FAR if far else shape.page_bytes + 64
    pool = torch.full((count, gap), 0xFF, dtype=torch.uint8, device=device)
    return pool[:, : shape.page_bytes]


def pages_for(device: torch.device, count: int, per_page: int) -> tuple[int, bool]:
    """How many pages to scatter ``count`` slots over, and whether they fit far apart on a GPU."""
    needed = count // per_page + 2
    return (max(needed, 20), needed < 60) if device.type == "cuda" else (needed, False)


def filled_pool(
    device: torch.device, shape: PageLayout, count: int, used: Tensor, far: bool = False
) -> Tensor:
    """Pages of which only the ``used`` ones (and of those only the entries) are not NaN."""
    pool = empty_pool(device, shape, count, far)
    offset = torch.arange(shape.entries_per_page, device=device)
    slots = (used.reshape(-1, 1).long() * shape.entries_per_page + offset).reshape(-1)
    rows = normal(device, slots.numel(), shape.head_dim, dtype=BF16)
    pages.store_entries(pool, shape, slots, rows)
    return pool


def stored_bytes(pool: Tensor, shape: PageLayout, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes at each slot (zeros for -1), and per row whether all other bytes are still 0xFF."""
    n = shape.entries_per_page
    page, offset = slots.clamp(min=0) // n, slots.clamp(min=0) % n
    line = offset[:, None]
    columns = torch.cat(
        [
            line * shape.payload_bytes + torch.arange(shape.payload_bytes, device=pool.device),
            shape.scale_offset
            + line * shape.scale_bytes
            + torch.arange(shape.scale_bytes, device=pool.device),
        ],
        dim=1,
    )
    stored = slots[:, None] >= 0
    found = pool[page[:, None], columns].masked_fill(~stored, 0)
    written = torch.zeros(pool.shape[0] + 1, pool.shape[1], dtype=torch.bool, device=pool.device)
    target = torch.where(stored, page[:, None], pool.shape[0])  # the last page takes what has none
    mark = torch.ones((), dtype=torch.bool, device=pool.device)  # no copy from the host in a graph
    written.index_put_((target.expand_as(columns), columns), mark)
    clean = (written[:-1] | (pool == 0xFF)).all()
    return found, clean.expand(slots.shape[0]).clone()


def block_table(device: torch.device, seqs: int, blocks: int, pool_pages: int) -> Tensor:
    """Scattered pages, a fifth of them elsewhere (-1)."""
    table = torch.randperm(pool_pages, device=device)[: seqs * blocks].view(seqs, blocks)
    table = table.masked_fill(torch.rand(seqs, blocks, device=device) < 0.2, -1)
    return table.to(torch.int32)
