"""FP8 products of one weight, and the ops that make their rows; DeepGEMM on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch

from benchmarks import library
from benchmarks.case import DEEP_GEMM, FP8_TFLOPS, Call, Case, Timed, own, randn, row_case, sets
from kernels import BlockWeight, prepare_weight, quant_fp8_weight, quant_rows
from kernels.linear.device_weight import Fp8Weight

DENSE = {  # name: (n, k)
    "wq_a+wkv": (1536, 4096),
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "shared w1|w3": (4096, 4096),
    "shared w2": (4096, 2048),
    "indexer wq_b": (8192, 1024),
    "pro wq_a+wkv": (2048, 7168),
    "pro wq_b": (65536, 1536),
    "pro wo_b": (7168, 16384),
    "pro shared w1|w3": (6144, 7168),
    "pro shared w2": (7168, 3072),
    "pro indexer wq_b": (8192, 1536),
}
LIMIT = 10.0


def make_weight(n: int, k: int) -> Fp8Weight:
    """A random weight in checkpoint format."""
    made = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(n, k, device="cuda") * 0.02)))
    return cast("Fp8Weight", made)  # what it makes of FP8 on Hopper


def linear_case(name: str, m: int) -> Case:
    """One weight at ``m`` rows, bf16 results."""
    return _product_case("linear_quant", name, m, 2.0, DEEP_GEMM, out_dtype=torch.bfloat16)


def gated_case(name: str, m: int) -> Case:
    """Gate and up in one weight, to the FP8 form of their SwiGLU; DeepGEMM makes the product alone."""
    alone = f"{DEEP_GEMM}: the product alone"
    return _product_case(
        "linear_swiglu_quant", name, m, 0.5, alone, limit=LIMIT, hidden_dtype=torch.bfloat16
    )


def _product_case(
    op: str, name: str, m: int, out_bytes: float, compared: str, **arguments: object
) -> Case:
    """``out_bytes``: written for a row of the weight and of x."""
    n, k = DENSE[name]
    moved = n * k + m * (k + out_bytes * n)

    def make() -> Timed:
        rows = quant_rows(randn(m, k))
        weights = sets(float(n * k) if m <= 1024 else moved, partial(make_weight, n, k))
        call = partial(own(op), **arguments)
        whole = op == "linear_quant"
        return Timed(
            calls=[partial(call, rows, w) for w in weights],
            library=library.products(weights, rows),
            backends=library.served_products(weights, rows) if whole else {},
        )

    return Case(
        op=op,
        shape=f"{name} M={m} N={n} K={k}",
        make=make,
        flops=2.0 * m * n * k,
        moved=moved,
        peak=FP8_TFLOPS,
        library=compared,
    )


def _rows_case(op: str, m: int, k: int) -> Case:
    def make() -> tuple[Call, Call | None]:
        x = randn(m, 2 * k)
        if op == "quant_rows":
            return partial(own(op), x[:, :k].contiguous()), None
        if op == "rms_norm_quant":
            weight = torch.rand(k, device="cuda", dtype=torch.bfloat16)
            return partial(own(op), x[:, :k].contiguous(), weight, 1e-6), None
        factors = torch.rand(m, device="cuda")
        return partial(own(op), x[:, :k], x[:, k:], limit=LIMIT, row_weight=factors), None

    size = {"quant_rows": 3, "rms_norm_quant": 5, "swiglu_quant": 5}[op] * m * k
    return row_case(op, f"{m}x{k}", make, moved=size, held=4.0 * m * k)


def cases() -> Iterable[Case]:
    """Every case."""
    for name in DENSE:
        for m in (1, 16, 128, 1024, 4096):
            yield linear_case(name, m)
    for m in (1, 128, 1024, 4096):
        yield gated_case("shared w1|w3", m)
    for op, k in (("quant_rows", 4096), ("rms_norm_quant", 4096), ("swiglu_quant", 2048)):
        for m in (1, 8, 32, 16384):
            yield _rows_case(op, m, k)
