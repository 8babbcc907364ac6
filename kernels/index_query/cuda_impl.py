"""The indexer's query in CUDA C++: the kernel of ``qkv_norm_rope`` on indexer heads alone."""

from __future__ import annotations

from torch import Tensor

from kernels.index_query import triton_impl
from kernels.qkv_norm_rope.cuda_impl import INDEX_DIMS, launch_rows, takes
from kernels.qkv_norm_rope.cuda_impl import build as build


def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, quantize: bool) -> Tensor:
    """See ``kernels.index_query.api.index_query``."""
    if takes(q, inv_freq, INDEX_DIMS):
        heads = launch_rows(positions, inv_freq, quantize=quantize, index_q=q)[2]
        if heads is not None:
            return heads
    return triton_impl.index_query(q, positions, inv_freq, quantize=quantize)
