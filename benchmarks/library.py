"""Other people's kernels on the same inputs, and the ops through optional backends.

Every function returns no calls where its package is not installed in the pinned version.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Call
from kernels import EntryPages, PageLayout, QuantRows, WindowRing, WindowRows, load_entries
from kernels.backend import DEEP_GEMM, FLASH_MLA, Backend
from kernels.linear.device_weight import Fp8Weight

E4M3_MAX = 448.0
FLASH_HEADS = (64, 128)  # what FlashMLA is compiled for


def module(name: str) -> Any:
    """A module that only a GPU machine can import."""
    return importlib.import_module(name)


def _when(backend: Backend, name: str) -> Any:
    return module(name) if backend.usable() else None


def scale_floats(scale: Tensor) -> Tensor:
    """E8M0 bytes as float32 (no 0, no 255: random weights have neither)."""
    return (scale.int() << 23).view(torch.float32)


def _by_columns(scale: Tensor) -> Tensor:
    """Scales of rows as DeepGEMM reads them: float32, columns at multiples of 16 bytes."""
    rows, columns = scale.shape
    out = torch.empty(columns, -(-rows // 4) * 4, device="cuda").t()[:rows]
    return out.copy_(scale_floats(scale))


def products(weights: Sequence[Fp8Weight], rows: QuantRows) -> list[Call]:
    """``linear_quant`` by DeepGEMM, its scales made beforehand."""
    deep_gemm = _when(DEEP_GEMM, "deep_gemm")
    if deep_gemm is None:
        return []
    a = (rows.q, _by_columns(rows.scale))
    out = torch.empty(rows.shape[0], weights[0].out_features, device="cuda", dtype=torch.bfloat16)
    pairs = [(w.data, scale_floats(w.scale)) for w in weights]
    return [partial(deep_gemm.fp8_gemm_nt, a, b, out, disable_ue8m0_cast=True) for b in pairs]


def served_products(weights: Sequence[Fp8Weight], rows: QuantRows) -> dict[str, Sequence[Call]]:
    """``linear_quant`` through the backend where its table serves the shape."""
    impl = _when(DEEP_GEMM, "kernels.quant_gemm.deep_gemm_impl")
    first = weights[0]
    if impl is None or not impl.serves(rows, first, torch.bfloat16):
        return {}
    return {
        "deep_gemm": [
            partial(impl.linear_quant, rows, w, out_dtype=torch.bfloat16) for w in weights
        ]
    }


def grouped(
    rows: QuantRows, data: Tensor, scale: Tensor, counts: Sequence[int], out_columns: int
) -> list[Call]:
    """One grouped product by DeepGEMM: each group's rows padded to whole tiles beforehand."""
    deep_gemm = _when(DEEP_GEMM, "deep_gemm")
    if deep_gemm is None:
        return []
    tile = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
    source, group, first = [], [], 0
    for number, count in enumerate(counts):
        gap = -count % tile
        source += [*range(first, first + count), *([first] * gap)]
        group += [number] * count + [-1] * gap
        first += count
    picked = torch.tensor(source, device="cuda")
    q = rows.q.view(torch.uint8)[picked].view(torch.float8_e4m3fn)
    a = (q, _by_columns(rows.scale[picked]))
    out = torch.empty(len(source), out_columns, device="cuda", dtype=torch.bfloat16)
    return [
        partial(
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous,
            *(a, (data, scale_floats(scale).contiguous()), out),
            torch.tensor(group, device="cuda", dtype=torch.int32),
            disable_ue8m0_cast=True,
        )
    ]


def index_scores(
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
) -> list[Call]:
    """``fp8_mqa_logits`` of one sequence, its operands made beforehand; hidden scores are not cleared."""
    deep_gemm = _when(DEEP_GEMM, "deep_gemm")
    if deep_gemm is None:
        return []
    per_page = layout.entries_per_page
    entry = torch.arange(int(num_entries.max()), device="cuda")
    slots = table[0].long()[entry // per_page] * per_page + entry % per_page
    keys, key_scale = _as_e4m3(load_entries(pool, layout, slots, torch.float32))
    codes, query_scale = _as_e4m3(q.float())
    start, stop = torch.zeros_like(row_seq).int(), num_entries.int()
    args = (codes, (keys, key_scale), w * query_scale, start, stop)
    return [partial(deep_gemm.fp8_mqa_logits, *args)]


def _as_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX)))
    return (x / scale[..., None]).to(torch.float8_e4m3fn), scale


def sparse_prefill(
    q: Tensor, window: WindowRows, entries: EntryPages | None, sink: Tensor, scale: float
) -> list[Call]:
    """FlashMLA over rows of the same sizes, gathered beforehand; slots are given."""
    if _flash() is None or q.shape[1] not in FLASH_HEADS:
        return []
    keys = window.start[:, None] + torch.arange(int(window.length.max()), device="cuda")
    kv = window.kv
    if entries is not None:
        count = entries.block_table.shape[1] * entries.layout.entries_per_page
        every = torch.arange(count, device="cuda").expand(q.shape[0], count)
        chosen = every if entries.index is None else entries.index
        keys = torch.cat((keys, chosen + len(kv)), dim=1)
        kv = torch.cat((kv, torch.randn(count, 512, device="cuda").to(kv.dtype)))
    slots = keys.int()[:, None].contiguous()
    run = torch.ops.sgl_kernel.sparse_prefill_fwd.default
    return [partial(run, q, kv[:, None], slots, scale, 512, sink, None)]


def sparse_decode(
    q: Tensor, ring: WindowRing, entries: Sequence[EntryPages | None], sink: Tensor, scale: float
) -> list[Call]:
    """FlashMLA over the same pages; slots and its split of the work are made beforehand."""
    impl = _flash()
    if impl is None or q.shape[1] not in FLASH_HEADS:
        return []
    calls: list[Call] = []
    run = torch.ops.sgl_kernel.sparse_decode_fwd.default
    plan: tuple[Any, Any] = (None, None)
    for chosen in entries:
        first = (impl.pages(ring.pool, ring.layout), ring.slots.int()[:, None].contiguous())
        extra: tuple[Any, Any] = (None, None)
        if chosen is not None:
            per_page = chosen.layout.entries_per_page
            count = chosen.block_table.shape[1] * per_page
            every = torch.arange(count, device="cuda").expand(q.shape[0], count)
            index = (every if chosen.index is None else chosen.index).long()
            page = torch.gather(chosen.block_table.long(), 1, index // per_page)
            slots = (page * per_page + index % per_page).int()[:, None].contiguous()
            extra = (impl.pages(chosen.pool, chosen.layout), slots)
        args = (q[:, None], *first, None, sink)
        if plan[0] is None:
            plan = run(*args, None, None, *extra, None, 512, scale)[2:]
        calls.append(partial(run, *args, *plan, *extra, None, 512, scale))
    return calls


def served_attention(
    through: Callable[[Any], list[Call]],
    q: Tensor,
    ring: WindowRing,
    entries: EntryPages | None,
    scale: float,
) -> dict[str, Sequence[Call]]:
    """``sparse_attention`` through FlashMLA where it serves the call."""
    impl = _flash()
    if impl is None or not impl.serves(q, ring, entries, scale):
        return {}
    return {"flash_mla": through(impl.sparse_attention)}


def _flash() -> Any:
    return _when(FLASH_MLA, "kernels.sparse_attention.flash_mla_impl")
