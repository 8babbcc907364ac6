"""Causeway's ops: one folder per op, exported lazily under their own names.

``from kernels import linear`` imports ``kernels.linear.api`` on first use and nothing else.
Contracts: docs/kernels.md. Many ops share the name of their folder; here the name always means the
op, whatever was imported before. So reach a module with ``from kernels.linear import api``, not
through the attribute chain ``kernels.linear.api``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same exports, for type checkers and editors
    # isort: off
    from kernels.compress.api import compress as compress
    from kernels.compress_decode.api import (
        CompressPart as CompressPart,
        compress_decode as compress_decode,
    )
    from kernels.compress_insert.api import compress_insert as compress_insert
    from kernels.contract import KernelContractError as KernelContractError
    from kernels.grouped_gemm.api import (
        PreparedExperts as PreparedExperts,
        expert_ffn as expert_ffn,
        prepare_experts as prepare_experts,
    )
    from kernels.grouped_output.api import (
        grouped_output as grouped_output,
        grouped_output_quant as grouped_output_quant,
    )
    from kernels.gumbel.api import gumbel_noise as gumbel_noise
    from kernels.hc.api import hc_head as hc_head, hc_post as hc_post, hc_pre as hc_pre
    from kernels.hc_norm.api import (
        hc_post_pre_norm as hc_post_pre_norm,
        hc_pre_norm as hc_pre_norm,
    )
    from kernels.hc_post_pre.api import hc_post_pre as hc_post_pre
    from kernels.index_query.api import index_query as index_query
    from kernels.index_score.api import index_score as index_score
    from kernels.index_topk.api import index_topk as index_topk
    from kernels.kv_insert.api import kv_insert as kv_insert
    from kernels.kv_norm_rope.api import kv_norm_rope as kv_norm_rope
    from kernels.linear.api import (
        PreparedWeight as PreparedWeight,
        linear as linear,
        prepare_weight as prepare_weight,
    )
    from kernels.linear.stack import (
        StackedWeight as StackedWeight,
        stack_weights as stack_weights,
    )
    from kernels.merge_lse.api import merge_lse as merge_lse
    from kernels.moe_gate.api import moe_gate as moe_gate
    from kernels.moe_permute.api import (
        PermutedQuantRows as PermutedQuantRows,
        PermutedRows as PermutedRows,
        moe_permute as moe_permute,
        moe_permute_quant as moe_permute_quant,
        moe_unpermute as moe_unpermute,
    )
    from kernels.numerics import (
        Numerics as Numerics,
        wide_dtype as wide_dtype,
        widen as widen,
    )
    from kernels.page_cache.api import (
        load_entries as load_entries,
        round_entries as round_entries,
        store_entries as store_entries,
    )
    from kernels.page_layout import (
        CacheDtype as CacheDtype,
        EntryKind as EntryKind,
        PageLayout as PageLayout,
    )
    from kernels.q_norm_rope.api import q_norm_rope as q_norm_rope
    from kernels.peer_sum.api import (
        PeerBoxes as PeerBoxes,
        box_bytes as box_bytes,
        peer_sum as peer_sum,
    )
    from kernels.qkv_norm_rope.api import qkv_norm_rope as qkv_norm_rope
    from kernels.quant.api import (
        act_quant as act_quant,
        block_amax as block_amax,
        dequant_fp4 as dequant_fp4,
        dequant_fp8 as dequant_fp8,
        fake_quant_fp4 as fake_quant_fp4,
        fake_quant_fp8 as fake_quant_fp8,
        pack_fp4 as pack_fp4,
        quant_fp8_weight as quant_fp8_weight,
    )
    from kernels.quant_gemm.api import (
        expert_ffn_quant as expert_ffn_quant,
        linear_quant as linear_quant,
        linear_swiglu_quant as linear_swiglu_quant,
    )
    from kernels.quant_rows.api import (
        QuantRows as QuantRows,
        quant_rows as quant_rows,
        rms_norm_quant as rms_norm_quant,
        swiglu_quant as swiglu_quant,
    )
    from kernels.rms_norm.api import rms_norm as rms_norm
    from kernels.rope.api import apply_rope as apply_rope
    from kernels.row_exchange.api import (
        RowCopy as RowCopy,
        RowStream as RowStream,
        copy_rows as copy_rows,
        pack_rows as pack_rows,
        unpack_rows as unpack_rows,
    )
    from kernels.sample_partial.api import (
        PartialSample as PartialSample,
        merge_samples as merge_samples,
        sample_partial as sample_partial,
    )
    from kernels.sparse_attention.api import (
        EntryPages as EntryPages,
        WindowRing as WindowRing,
        WindowRows as WindowRows,
        sparse_attention as sparse_attention,
    )
    from kernels.side_stream import beside as beside
    from kernels.swiglu.api import swiglu as swiglu
    from kernels.topk.api import topk_merge as topk_merge, topk_select as topk_select
    from kernels.weight import BlockWeight as BlockWeight
    # isort: on

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {
    "KernelContractError": "kernels.contract",
    "Numerics": "kernels.numerics",
    "wide_dtype": "kernels.numerics",
    "widen": "kernels.numerics",
    "CacheDtype": "kernels.page_layout",
    "EntryKind": "kernels.page_layout",
    "PageLayout": "kernels.page_layout",
    "BlockWeight": "kernels.weight",
    "beside": "kernels.side_stream",
    "act_quant": "kernels.quant.api",
    "block_amax": "kernels.quant.api",
    "dequant_fp4": "kernels.quant.api",
    "dequant_fp8": "kernels.quant.api",
    "fake_quant_fp4": "kernels.quant.api",
    "fake_quant_fp8": "kernels.quant.api",
    "pack_fp4": "kernels.quant.api",
    "quant_fp8_weight": "kernels.quant.api",
    "PreparedWeight": "kernels.linear.api",
    "linear": "kernels.linear.api",
    "StackedWeight": "kernels.linear.stack",
    "stack_weights": "kernels.linear.stack",
    "prepare_weight": "kernels.linear.api",
    "PreparedExperts": "kernels.grouped_gemm.api",
    "expert_ffn": "kernels.grouped_gemm.api",
    "prepare_experts": "kernels.grouped_gemm.api",
    "QuantRows": "kernels.quant_rows.api",
    "quant_rows": "kernels.quant_rows.api",
    "rms_norm_quant": "kernels.quant_rows.api",
    "swiglu_quant": "kernels.quant_rows.api",
    "linear_quant": "kernels.quant_gemm.api",
    "linear_swiglu_quant": "kernels.quant_gemm.api",
    "expert_ffn_quant": "kernels.quant_gemm.api",
    "swiglu": "kernels.swiglu.api",
    "rms_norm": "kernels.rms_norm.api",
    "PeerBoxes": "kernels.peer_sum.api",
    "box_bytes": "kernels.peer_sum.api",
    "peer_sum": "kernels.peer_sum.api",
    "q_norm_rope": "kernels.q_norm_rope.api",
    "kv_norm_rope": "kernels.kv_norm_rope.api",
    "apply_rope": "kernels.rope.api",
    "kv_insert": "kernels.kv_insert.api",
    "qkv_norm_rope": "kernels.qkv_norm_rope.api",
    "load_entries": "kernels.page_cache.api",
    "round_entries": "kernels.page_cache.api",
    "store_entries": "kernels.page_cache.api",
    "compress": "kernels.compress.api",
    "compress_insert": "kernels.compress_insert.api",
    "CompressPart": "kernels.compress_decode.api",
    "compress_decode": "kernels.compress_decode.api",
    "index_query": "kernels.index_query.api",
    "index_score": "kernels.index_score.api",
    "index_topk": "kernels.index_topk.api",
    "topk_merge": "kernels.topk.api",
    "topk_select": "kernels.topk.api",
    "EntryPages": "kernels.sparse_attention.api",
    "WindowRing": "kernels.sparse_attention.api",
    "WindowRows": "kernels.sparse_attention.api",
    "sparse_attention": "kernels.sparse_attention.api",
    "merge_lse": "kernels.merge_lse.api",
    "grouped_output": "kernels.grouped_output.api",
    "grouped_output_quant": "kernels.grouped_output.api",
    "PermutedRows": "kernels.moe_permute.api",
    "PermutedQuantRows": "kernels.moe_permute.api",
    "hc_post_pre": "kernels.hc_post_pre.api",
    "hc_pre_norm": "kernels.hc_norm.api",
    "hc_post_pre_norm": "kernels.hc_norm.api",
    "hc_head": "kernels.hc.api",
    "hc_post": "kernels.hc.api",
    "hc_pre": "kernels.hc.api",
    "moe_gate": "kernels.moe_gate.api",
    "moe_permute": "kernels.moe_permute.api",
    "moe_permute_quant": "kernels.moe_permute.api",
    "moe_unpermute": "kernels.moe_permute.api",
    "gumbel_noise": "kernels.gumbel.api",
    "PartialSample": "kernels.sample_partial.api",
    "sample_partial": "kernels.sample_partial.api",
    "merge_samples": "kernels.sample_partial.api",
    "RowCopy": "kernels.row_exchange.api",
    "RowStream": "kernels.row_exchange.api",
    "copy_rows": "kernels.row_exchange.api",
    "pack_rows": "kernels.row_exchange.api",
    "unpack_rows": "kernels.row_exchange.api",
}

__all__ = sorted(_EXPORTS)


class _Ops(ModuleType):
    """The package itself: keeps submodules from taking the name of the op they define."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            return  # the import system binds kernels.linear (a folder) here; the op owns the name
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


sys.modules[__name__].__class__ = _Ops
