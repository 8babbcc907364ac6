"""FP8 products and quantised rows on one GPU: this project's kernels, and DeepGEMM where installed.

``PYTHONPATH=. python benchmarks/gemm_cases.py [--library] [--json FILE]``. Times are those of one launch
inside a CUDA graph that walks several copies of the weights, so that none is found in L2; random data.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gemm_common import (
    COPY_TBPS,
    FP8_TFLOPS,
    ROTATE_BYTES,
    Row,
    graph_us,
    make_weight,
)
from benchmarks.moe_cases import measure_experts
from kernels import QuantRows, quant_rows, rms_norm_quant, swiglu_quant
from kernels.linear.device_weight import Fp8Weight
from kernels.quant_gemm import cuda_impl, tuning

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


def copies(w: Fp8Weight, rows: int) -> list[Fp8Weight]:
    """Enough copies that a walk over them leaves L2; one where the rows alone do."""
    size = w.data.numel()
    count = 1 if rows * (w.in_features + 2 * w.out_features) > ROTATE_BYTES else 16
    count = max(1, min(count, ROTATE_BYTES // size))
    return [w] + [
        Fp8Weight(data=w.data.clone(), scale=w.scale.clone(), kind=w.kind) for _ in range(count - 1)
    ]


def dense_calls(
    weights: list[Fp8Weight], rows: QuantRows, tile: tuning.Tile | None = None
) -> list[Callable[[], object]]:
    """One product per copy."""
    out = torch.empty(rows.shape[0], weights[0].out_features, device="cuda", dtype=torch.bfloat16)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = tile or tuning.choose(out.shape[0], out.shape[1], processors)
    return [lambda w=w: cuda_impl.multiply(chosen, rows, w, out) for w in weights]  # type: ignore[misc]


def scale_floats(scale: Tensor) -> Tensor:
    """E8M0 bytes as float32."""
    return (scale.int() << 23).view(torch.float32)


def library_module() -> ModuleType | None:
    """DeepGEMM, where it is installed."""
    try:
        return importlib.import_module("deep_gemm")
    except ImportError:
        return None


def library_calls(
    module: ModuleType, weights: list[Fp8Weight], rows: QuantRows
) -> list[Callable[[], object]]:
    """The same products by DeepGEMM, its scales laid out as it wants them."""
    m, _ = rows.shape
    q = rows.q.contiguous()
    sa = torch.empty(rows.scale.shape[1], -(-m // 4) * 4, device="cuda").t()[:m]
    sa.copy_(scale_floats(rows.scale))
    out = torch.empty(m, weights[0].out_features, device="cuda", dtype=torch.bfloat16)
    pairs = [(w.data, scale_floats(w.scale)) for w in weights]
    return [
        lambda b=b: module.fp8_gemm_nt((q, sa), b, out, disable_ue8m0_cast=True)  # type: ignore[misc]
        for b in pairs
    ]


def dense_row(name: str, m: int, hardware: str, date: str, module: ModuleType | None) -> Row:
    """Measure one weight at ``m`` rows."""
    n, k = DENSE[name]
    weights = copies(make_weight(n, k), m)
    rows = quant_rows(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
    us = graph_us(dense_calls(weights, rows))
    other = None if module is None else graph_us(library_calls(module, weights, rows))
    flops, size = 2.0 * m * n * k, n * k + m * (k + 2 * n)
    limit_us = max(flops / FP8_TFLOPS, size / COPY_TBPS) / 1e6
    return Row(
        op="linear_quant",
        shape=f"{name} M={m} N={n} K={k}",
        implementation="cuda",
        us=round(us, 2),
        tflops=round(flops / us / 1e6, 1),
        tbps=round(size / us / 1e6, 3),
        share_of_limit=round(limit_us / us, 3),
        library=None if other is None else "sgl-deep-gemm 0.1.4.post1",
        library_us=None if other is None else round(other, 2),
        hardware=hardware,
        date=date,
    )


def rows_row(op: str, m: int, k: int, hardware: str, date: str) -> Row:
    """Measure one op that makes quantised rows."""
    count = max(1, min(16, ROTATE_BYTES // max(1, m * k * 4)))
    weight = torch.rand(k, device="cuda", dtype=torch.bfloat16)
    factors = torch.rand(m, device="cuda")
    calls: list[Callable[[], object]] = []
    size = {"quant_rows": 3, "rms_norm_quant": 5, "swiglu_quant": 5}[op] * m * k
    for _ in range(count):
        x = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16)
        g, u = x[:, :k], x[:, k:]
        if op == "quant_rows":
            plain = g.contiguous()
            calls.append(lambda plain=plain: quant_rows(plain))  # type: ignore[misc]
        elif op == "rms_norm_quant":
            plain = g.contiguous()
            calls.append(lambda plain=plain: rms_norm_quant(plain, weight, 1e-6))  # type: ignore[misc]
        else:
            calls.append(  # type: ignore[misc]
                lambda g=g, u=u: swiglu_quant(g, u, limit=10.0, row_weight=factors)
            )
    us = graph_us(calls)
    return Row(
        op=op,
        shape=f"rows={m} columns={k} bf16",
        implementation="cuda",
        us=round(us, 2),
        tflops=None,
        tbps=round(size / us / 1e6, 3),
        share_of_limit=round(size / COPY_TBPS / 1e6 / us, 3),
        library=None,
        library_us=None,
        hardware=hardware,
        date=date,
    )


def measure(module: ModuleType | None, hardware: str, date: str) -> list[Row]:
    """Every case."""
    made = [
        dense_row(
            name, m, hardware, date, None if name.startswith("pro ") and m != 4096 else module
        )
        for name in DENSE
        for m in (1, 16, 128, 1024, 4096)
    ]
    made += measure_experts(hardware, date)
    for op in ("quant_rows", "rms_norm_quant", "swiglu_quant"):
        made += [
            rows_row(op, m, 2048 if op == "swiglu_quant" else 4096, hardware, date)
            for m in (1, 32, 16384)
        ]
    return made


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = []
    for r in rows:
        other = (
            "" if r.library_us is None else f" | {r.library_us:8.1f} {r.library_us / r.us:5.2f}x"
        )
        lines.append(
            f"{r.op:16s} {r.shape:44s} {r.us:9.2f} us {r.tflops or 0:7.0f} TF/s {r.tbps or 0:6.2f} TB/s"
            f" {r.share_of_limit:5.2f}{other}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", action="store_true", help="measure DeepGEMM too")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--date", default="", help="date written into the rows")
    args = parser.parse_args()
    made = measure(
        library_module() if args.library else None, torch.cuda.get_device_name(), args.date
    )
    print(table(made))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in made], indent=1) + "\n")


if __name__ == "__main__":
    main()
