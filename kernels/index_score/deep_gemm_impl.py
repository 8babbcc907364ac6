"""``index_score`` of a long prefill by DeepGEMM (package ``sgl-deep-gemm``), else by the own kernel.

DeepGEMM multiplies e4m3 queries with the keys of one sequence. It serves calls of at least ``ROWS`` rows
over room for ``ENTRIES`` entries of one sequence whose pages are all here, if e4m3 holds every query
exactly (FP4-rounded queries are): the own kernel's value up to the order of the sum over heads. Whether
that is so comes back to the host with the width, in the one read that the op needs anyway.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import deep_gemm
import torch
from torch import Tensor

from kernels.backend import DEEP_GEMM, BackendError
from kernels.index_score import cuda_impl
from kernels.nvcc import check_launch, load_library, pointer, stream
from kernels.page_layout import CacheDtype, EntryKind, PageLayout

# From here on DeepGEMM is faster than the own kernel, its operands included (benchmarks/results/kernels.md).
ROWS, ENTRIES = 2048, 16384
_SOURCE = Path(__file__).parent / "deep_gemm" / "operands.cu"
_HEADS, _DIM = 64, 128
_STRIDE = 256  # columns; the row stride is a multiple of it


def build() -> None:
    """Compile the own kernel, the operands' and DeepGEMM's."""
    cuda_impl.build()
    load_library(_SOURCE)
    device = torch.device("cuda", torch.cuda.current_device())
    layout = PageLayout(
        kind=EntryKind.INDEX,
        dtype=CacheDtype.FP8,
        head_dim=_DIM,
        rope_dim=0,
        entries_per_page=_STRIDE,
    )
    index_score(
        torch.zeros(ROWS, _HEADS, _DIM, dtype=torch.bfloat16, device=device),
        torch.zeros(ROWS, _HEADS, device=device),
        torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device),
        layout,
        torch.zeros(1, ENTRIES // _STRIDE, dtype=torch.int32, device=device),
        torch.zeros(ROWS, dtype=torch.int64, device=device),
        torch.full((ROWS,), _STRIDE, dtype=torch.int64, device=device),
    )
    torch.cuda.synchronize(device)


def index_score(
    q: Tensor,
    w: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    row_seq: Tensor,
    num_entries: Tensor,
) -> Tensor:
    """See ``kernels.index_score.api.index_score``. Reads three numbers back: one synchronisation."""
    own = functools.partial(
        cuda_impl.index_score, q, w, pool, layout, block_table, row_seq, num_entries
    )
    rows = q.shape[0]
    seqs, blocks = block_table.shape
    small = rows < ROWS or blocks * layout.entries_per_page < ENTRIES
    if small or seqs != 1 or not cuda_impl.supports(q, layout):
        return own()
    if q.data_ptr() % 16 or q.stride(0) % 8 or q.stride(1) % 8:
        q = q.contiguous()
    codes = torch.empty(rows, _HEADS, _DIM, dtype=torch.float8_e4m3fn, device=q.device)
    weights = torch.empty(rows, _HEADS, dtype=torch.float32, device=q.device)
    starts, ends = torch.empty(2, rows, dtype=torch.int32, device=q.device)
    facts = torch.zeros(3, dtype=torch.int32, device=q.device)
    code = _library().causeway_index_queries(
        *(pointer(q), q.stride(0), q.stride(1), pointer(w), w.stride(0)),
        *(pointer(row_seq), pointer(num_entries), rows, pointer(block_table), blocks),
        *(pointer(codes), pointer(weights), pointer(starts), pointer(ends), pointer(facts)),
        stream(q),
    )
    check_launch("index_score: queries", code)
    width, inexact, behind_hole = facts.tolist()
    if inexact or width == 0 or (blocks - behind_hole) * layout.entries_per_page < width:
        return own()
    padded = -(-width // _STRIDE) * _STRIDE
    keys = torch.empty(padded, _DIM, dtype=torch.float8_e4m3fn, device=q.device)
    scales = torch.empty(padded, dtype=torch.float32, device=q.device)
    code = _library().causeway_index_keys(
        *(pointer(pool), pool.stride(0), layout.entries_per_page, pointer(block_table)),
        *(width, padded, pointer(keys), pointer(scales), stream(q)),
    )
    check_launch("index_score: keys", code)
    with DEEP_GEMM.named("fp8_mqa_logits"):
        scores: Tensor = deep_gemm.fp8_mqa_logits(
            codes, (keys, scales), weights, starts, ends, clean_logits=False
        )
    stride = scores.stride(0)
    if stride % _STRIDE or stride <= padded:
        raise BackendError(f"{DEEP_GEMM}: fp8_mqa_logits returned rows {stride} apart for {padded}")
    code = _library().causeway_index_hide(
        *(pointer(scores), stride, pointer(ends), rows, width, padded, stream(q))
    )
    check_launch("index_score: hide", code)
    return scores[:, :width]


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_library(_SOURCE)
    address, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.causeway_index_queries.argtypes = (
        *(address, wide, wide, address, wide, address, address, number, address, number),
        *(address, address, address, address, address, address),
    )
    library.causeway_index_keys.argtypes = (
        *(address, wide, number, address, number, number, address, address, address),
    )
    library.causeway_index_hide.argtypes = (address, wide, address, number, number, number, address)
    return library
