"""Causeway's ops: one folder per op, exported lazily under their own names.

``from kernels import linear`` imports ``kernels.linear.api`` on first use and nothing else. Contracts:
docs/kernels.md. Many ops share the name of their folder; here the name always means the op, whatever
was imported before. So reach a module with ``from kernels.linear import api``, not through the
attribute chain ``kernels.linear.api``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {
    "KernelContractError": "kernels.contract",
    "Numerics": "kernels.numerics",
    "CacheDtype": "kernels.page_layout",
    "EntryKind": "kernels.page_layout",
    "PageLayout": "kernels.page_layout",
    "BlockWeight": "kernels.weight",
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
    "prepare_weight": "kernels.linear.api",
    "PreparedExperts": "kernels.grouped_gemm.api",
    "expert_ffn": "kernels.grouped_gemm.api",
    "prepare_experts": "kernels.grouped_gemm.api",
    "swiglu": "kernels.swiglu.api",
    "rms_norm": "kernels.rms_norm.api",
    "q_norm_rope": "kernels.q_norm_rope.api",
    "kv_norm_rope": "kernels.kv_norm_rope.api",
    "apply_rope": "kernels.rope.api",
    "load_entries": "kernels.page_cache.api",
    "round_entries": "kernels.page_cache.api",
    "store_entries": "kernels.page_cache.api",
    "compress": "kernels.compress.api",
    "compressor_rows": "kernels.compress.api",
    "index_query": "kernels.index_query.api",
    "index_score": "kernels.index_score.api",
    "topk_merge": "kernels.topk.api",
    "topk_select": "kernels.topk.api",
    "EntryPages": "kernels.sparse_attention.api",
    "WindowRing": "kernels.sparse_attention.api",
    "WindowRows": "kernels.sparse_attention.api",
    "sparse_attention": "kernels.sparse_attention.api",
    "merge_lse": "kernels.merge_lse.api",
    "grouped_output": "kernels.grouped_output.api",
    "hc_head": "kernels.hc.api",
    "hc_post": "kernels.hc.api",
    "hc_pre": "kernels.hc.api",
    "moe_gate": "kernels.moe_gate.api",
    "gumbel_noise": "kernels.gumbel.api",
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
