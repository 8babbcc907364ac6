"""Grouped FP8 products of experts: single ones, and the whole feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gemm_common import COPY_TBPS, FP8_TFLOPS, Row, graph_us, make_weight
from kernels import expert_ffn_quant, quant_rows
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.quant_gemm import cuda_impl, tuning

EXPERTS = {"w1|w3": (64, 4096, 4096), "w2": (64, 4096, 2048)}  # name: (experts, n, k)


def grouped_row(name: str, counts: list[int], hardware: str, date: str) -> Row:
    """Measure one grouped product; ``counts`` are the rows of each expert."""
    experts, n, k = EXPERTS[name]
    w = make_weight(experts * n, k)
    data, scale = w.data.view(experts, n, k), w.scale.view(experts, n // 128, k // 128)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    total = sum(counts)
    rows = quant_rows(torch.randn(total, k, device="cuda", dtype=torch.bfloat16))
    out = torch.empty(total, n, device="cuda", dtype=torch.bfloat16)
    tile = tuning.choose_grouped(total, experts)
    call = lambda: cuda_impl.multiply_grouped(tile, rows, data, scale, offsets, out)  # noqa: E731
    us = graph_us([call])
    flops = 2.0 * total * n * k
    size = n * k * sum(c > 0 for c in counts) + total * (k + 2 * n)
    limit_us = max(flops / FP8_TFLOPS, size / COPY_TBPS) / 1e6
    return Row(
        op="expert_ffn_quant",
        shape=f"{name} rows={total} experts={experts} N={n} K={k}",
        implementation="cuda",
        us=round(us, 2),
        tflops=round(flops / us / 1e6, 1),
        tbps=round(size / us / 1e6, 3),
        share_of_limit=round(limit_us / us, 3),
        library=None,
        library_us=None,
        hardware=hardware,
        date=date,
    )


def pair_row(packed: bool, counts: list[int], hardware: str, date: str) -> Row:
    """Measure ``expert_ffn_quant`` whole: both products and the SwiGLU between them."""
    experts, n, k = EXPERTS["w1|w3"]
    generator = torch.Generator("cuda").manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device="cuda", generator=generator).to(torch.uint8)

    def blocks(rows: int, columns: int, low: int) -> Tensor:
        return torch.randint(low, low + 4, (experts, rows, columns), device="cuda").to(torch.uint8)

    inner = n // 2
    common = {
        "w1": (None,) * experts,
        "w3": (),
        "w2": (),
        "hidden_size": k,
        "intermediate_size": inner,
        "device": torch.device("cuda"),
        "w13_scale": blocks(n // 128, k // 128, 114),
        "w2_scale": blocks(k // 128, inner // 128, 114),
        "up_row": inner,
    }
    made: Fp4Experts | Fp8Experts
    if packed:
        made = Fp4Experts(
            w13=random(experts, n, k // 2).view(torch.int8),
            w13_sub=blocks(n, k // 32, 118),
            w2_data=random(experts, k, inner // 2).view(torch.int8),
            w2_sub=blocks(k, inner // 32, 118),
            **common,  # type: ignore[arg-type]
        )
    else:
        # Every second code of e4m3 is finite: clear the lowest bit.
        made = Fp8Experts(
            w13=(random(experts, n, k) & 0xFE).view(torch.float8_e4m3fn),
            w2_data=(random(experts, k, inner) & 0xFE).view(torch.float8_e4m3fn),
            **common,  # type: ignore[arg-type]
        )
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
    total = sum(counts)
    rows = quant_rows(torch.randn(total, k, device="cuda", dtype=torch.bfloat16))
    factors = torch.rand(total, device="cuda")

    def call() -> Tensor:
        return expert_ffn_quant(rows, offsets, factors, made, limit=10.0, out_dtype=torch.bfloat16)

    us = graph_us([call])
    weights = n * k + k * inner
    flops = 2.0 * total * weights
    bytes_each = 0.53125 if packed else 1.0
    size = weights * bytes_each * sum(c > 0 for c in counts) + total * (3 * k + 5 * inner)
    limit_us = max(flops / FP8_TFLOPS, size / COPY_TBPS) / 1e6
    return Row(
        op="expert_ffn_quant",
        shape=f"whole, {'FP4' if packed else 'FP8'} weights, rows={total} experts={experts}",
        implementation="cuda",
        us=round(us, 2),
        tflops=round(flops / us / 1e6, 1),
        tbps=round(size / us / 1e6, 3),
        share_of_limit=round(limit_us / us, 3),
        library=None,
        library_us=None,
        hardware=hardware,
        date=date,
    )


def decode_counts(tokens: int) -> list[int]:
    """Rows of 64 local experts of 256 when ``tokens`` tokens choose six each."""
    generator = torch.Generator().manual_seed(7)
    chosen = torch.rand(tokens, 256, generator=generator).topk(6).indices.flatten()
    return torch.bincount(chosen, minlength=256)[:64].tolist()


def measure_experts(hardware: str, date: str) -> list[Row]:
    """Every case."""
    generator = torch.Generator().manual_seed(3)
    loads = torch.rand(64, generator=generator) + 0.5
    prefill = (loads / loads.sum() * 49152).long().tolist()
    prefill[0] += 49152 - sum(prefill)
    made = []
    for name in EXPERTS:
        made.append(grouped_row(name, prefill, hardware, date))
        made.append(grouped_row(name, [1 + i % 12 for i in range(64)], hardware, date))
        made += [grouped_row(name, decode_counts(t), hardware, date) for t in (8, 32, 128)]
    for packed in (False, True):
        made += [
            pair_row(packed, counts, hardware, date) for counts in (prefill, decode_counts(32))
        ]
    return made
