"""Every op with its implementations: one visible table.

Every public op has a line in ``FOLDERS``; every op has the torch reference. A faster implementation
joins by a line in ``FASTER``. Optional backends (``kernels.backend``) stand ahead of the own kernel they
use for what they do not serve, and join only where their exact version is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.backend import DEEP_GEMM, FLASH_MLA, Backend
from kernels.platform import Capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to run an op: function ``op`` of ``module``.

    Args:
        name: ``reference``, or the language of a faster one.
        module: dotted module that defines a function with the op's name.
        device_types: device types it runs on.
        min_compute: smallest CUDA compute capability; (0, 0) for any.
        only_compute: the one capability it is compiled for (sm_90a code runs nowhere else), or None.
        why: a few words for the table that ``describe`` prints.
        backend: the optional package it needs, or None.
    """

    name: str
    module: str
    device_types: tuple[str, ...]
    min_compute: tuple[int, int] = (0, 0)
    only_compute: tuple[int, int] | None = None
    why: str
    backend: Backend | None = None

    def runs_on(self, cap: Capability) -> bool:
        """Whether the device, and what is installed, meets the needs."""
        fits = self.only_compute is None or cap.compute == self.only_compute
        fits = fits and (self.backend is None or self.backend.usable())
        return fits and cap.device_type in self.device_types and cap.compute >= self.min_compute


# Op -> folder below kernels/.
FOLDERS: dict[str, str] = {
    "act_quant": "quant",
    "block_amax": "quant",
    "dequant_fp4": "quant",
    "dequant_fp8": "quant",
    "fake_quant_fp4": "quant",
    "fake_quant_fp8": "quant",
    "pack_fp4": "quant",
    "quant_fp8_weight": "quant",
    "quant_rows": "quant_rows",
    "rms_norm_quant": "quant_rows",
    "swiglu_quant": "quant_rows",
    "prepare_weight": "linear",
    "linear": "linear",
    "prepare_experts": "grouped_gemm",
    "expert_ffn": "grouped_gemm",
    "linear_quant": "quant_gemm",
    "linear_swiglu_quant": "quant_gemm",
    "expert_ffn_quant": "quant_gemm",
    "swiglu": "swiglu",
    "rms_norm": "rms_norm",
    "apply_rope": "rope",
    "q_norm_rope": "q_norm_rope",
    "kv_norm_rope": "kv_norm_rope",
    "kv_insert": "kv_insert",
    "qkv_norm_rope": "qkv_norm_rope",
    "store_entries": "page_cache",
    "load_entries": "page_cache",
    "round_entries": "page_cache",
    "compress": "compress",
    "compress_insert": "compress_insert",
    "compress_decode": "compress_decode",
    "index_query": "index_query",
    "index_score": "index_score",
    "index_topk": "index_topk",
    "topk_select": "topk",
    "topk_merge": "topk",
    "sparse_attention": "sparse_attention",
    "merge_lse": "merge_lse",
    "grouped_output": "grouped_output",
    "grouped_output_quant": "grouped_output",
    "hc_pre": "hc",
    "hc_post": "hc",
    "hc_head": "hc",
    "hc_post_pre": "hc_post_pre",
    "hc_pre_norm": "hc_norm",
    "hc_post_pre_norm": "hc_norm",
    "moe_gate": "moe_gate",
    "moe_permute": "moe_permute",
    "moe_permute_quant": "moe_permute",
    "moe_unpermute": "moe_permute",
    "gumbel_noise": "gumbel",
    "sample_partial": "sample_partial",
    "merge_samples": "sample_partial",
    "peer_sum": "peer_sum",
    "pack_rows": "row_exchange",
    "unpack_rows": "row_exchange",
    "copy_rows": "row_exchange",
}


# Ops of this folder run on weights at load time, in tests and inside other twins; no step calls them.
LOAD_TIME = "quant"


def _hopper(folder: str, why: str) -> tuple[Implementation, ...]:
    """CUDA C++ for sm_90a."""
    return (
        Implementation(
            name="cuda",
            module=f"kernels.{folder}.cuda_impl",
            device_types=("cuda",),
            only_compute=(9, 0),
            why=why,
        ),
    )


def _triton(folder: str, why: str) -> tuple[Implementation, ...]:
    """Triton, for GPUs with FP8 conversions."""
    return (
        Implementation(
            name="triton",
            module=f"kernels.{folder}.triton_impl",
            device_types=("cuda",),
            min_compute=(9, 0),
            why=why,
        ),
    )


def _optional(folder: str, name: str, backend: Backend, why: str) -> Implementation:
    """A backend for Hopper."""
    return Implementation(
        name=name,
        module=f"kernels.{folder}.{name}_impl",
        device_types=("cuda",),
        only_compute=(9, 0),
        why=why,
        backend=backend,
    )


def _rows(folder: str, why: str) -> tuple[Implementation, ...]:
    """CUDA C++ for sm_90a for the dims of the models, which hands other dims to Triton."""
    return (
        *_hopper(folder, f"{why}, else Triton; f64 runs the twin"),
        *_triton(folder, "one pass; f64 runs the twin"),
    )


# Op -> implementations preferred over the reference, best first.
FASTER: dict[str, tuple[Implementation, ...]] = {
    "quant_rows": _hopper("quant_rows", "one pass, codes and scales"),
    "rms_norm_quant": _hopper("quant_rows", "one pass, norm and codes"),
    "swiglu_quant": _hopper("quant_rows", "one pass, the hidden rows are not written"),
    "prepare_weight": _hopper("linear", "keeps the checkpoint's bytes"),
    "linear": _hopper("linear", "FP8 or BF16 tensor cores; f64 and unrounded FP8 run the twin"),
    "prepare_experts": _hopper("grouped_gemm", "FP8 stacks; FP4 re-encoded where exact"),
    "expert_ffn": _hopper("grouped_gemm", "two grouped FP8 products"),
    "linear_quant": (
        _optional(
            "quant_gemm", "deep_gemm", DEEP_GEMM, "1024 rows and more of V4 weights; else cuda"
        ),
        *_hopper("quant_gemm", "FP8 tensor cores"),
    ),
    "linear_swiglu_quant": _hopper("quant_gemm", "SwiGLU and FP8 form in the product's store"),
    "expert_ffn_quant": _hopper("quant_gemm", "two grouped FP8 products, SwiGLU in a store"),
    "index_score": _hopper("index_score", "FP8 tensor cores; bf16 q of 64 x 128, else the twin"),
    "index_topk": _hopper(
        "index_topk", "scores stay on the GPU; bf16 q of 64 x 128, else the twin"
    ),
    "topk_select": _hopper("topk", "one pass over f32 rows; f64 runs the twin"),
    "topk_merge": _hopper("topk", "f32, up to 8192 candidates; else the twin"),
    "sparse_attention": (
        _optional("sparse_attention", "flash_mla", FLASH_MLA, "decode of large batches; else cuda"),
        *_hopper("sparse_attention", "BF16 tensor cores; bf16 q, d 512, else twin"),
    ),
    "merge_lse": _hopper("merge_lse", "one pass; f64 runs the twin"),
    "grouped_output": _hopper(
        "grouped_output", "one launch; bf16 o, d >= 512, 64 rotary, bf16 or FP8 wo_a; else the twin"
    ),
    "grouped_output_quant": _hopper(
        "grouped_output",
        "as grouped_output, codes in its store where a group is 128-columns blocks",
    ),
    "swiglu": _triton("swiglu", "one pass; f64 runs the twin"),
    "rms_norm": _triton("rms_norm", "one pass; f64 runs the twin"),
    "apply_rope": _triton("rope", "one pass; f64 runs the twin"),
    "q_norm_rope": _rows("q_norm_rope", "one pass; dims 128, 512"),
    "kv_norm_rope": _rows("kv_norm_rope", "one pass; dims 128, 512"),
    "kv_insert": _rows("kv_insert", "one pass into the page; dims 128, 512"),
    "qkv_norm_rope": _hopper("qkv_norm_rope", "one launch; other dims: its ops one by one"),
    "store_entries": _triton("page_cache", "one pass; f64 runs the twin"),
    "load_entries": _triton("page_cache", "one pass; f64 runs the twin"),
    "round_entries": _triton("page_cache", "one pass; f64 runs the twin"),
    "compress": _rows("compress", "one launch; dims 128, 512, indexer 64, 128"),
    "compress_insert": _rows("compress_insert", "as compress, into the page"),
    "compress_decode": _hopper("compress_decode", "one launch; dims as compress, else the twin"),
    "index_query": _rows("index_query", "one pass; dims 64, 128"),
    "hc_pre": _hopper("hc", "bf16, 4 streams, D 4096..7168; else Triton; f64 runs the twin"),
    "hc_post": _hopper("hc", "one pass in Triton; f64 runs the twin"),
    "hc_head": _hopper("hc", "as hc_pre"),
    "hc_post_pre": _hopper("hc_post_pre", "as hc_pre, streams made on the way"),
    "hc_pre_norm": _hopper("hc_norm", "as hc_pre, norm and codes behind it"),
    "hc_post_pre_norm": _hopper("hc_norm", "as hc_post_pre, norm and codes behind it"),
    "moe_gate": (
        *_hopper("moe_gate", "bf16: one launch for up to 64 rows, else two; else Triton"),
        *_triton("moe_gate", "exact f32 logits of bf16 on the tensor cores, no host sync"),
    ),
    "moe_permute": (
        *_hopper("moe_permute", "counting sort by one cluster, then the copies; few rows: Triton"),
        *_triton("moe_permute", "counting sort on the device, no host sync"),
    ),
    "moe_permute_quant": (
        *_hopper("moe_permute", "the same, codes and scales are copied; few rows: Triton"),
        *_triton("moe_permute", "codes and scales are copied, no host sync"),
    ),
    "moe_unpermute": _triton("moe_permute", "one pass; f64 runs the twin"),
    "gumbel_noise": _triton("gumbel", "one pass, the twin's bits"),
    "sample_partial": _hopper("sample_partial", "one pass, noise only where it may win"),
    "merge_samples": _triton("sample_partial", "one launch for the ranks' numbers"),
    "peer_sum": _hopper("peer_sum", "values and tags in one trip between the GPUs"),
    "pack_rows": _hopper("row_exchange", "one launch for all streams"),
    "unpack_rows": _hopper("row_exchange", "one launch for all streams"),
    "copy_rows": _hopper("row_exchange", "one launch for all lists"),
}


def candidates(op: str) -> tuple[Implementation, ...]:
    """Every implementation of ``op``, best first, the torch twin last."""
    twin = Implementation(
        name="reference",
        module=f"kernels.{FOLDERS[op]}.reference",
        device_types=("cpu", "cuda"),
        why="torch twin; no faster implementation for this device",
    )
    return (*FASTER.get(op, ()), twin)
