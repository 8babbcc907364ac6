"""FP8 products of many experts: single ones, and the whole feed-forward; DeepGEMM on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import library
from benchmarks.case import DEEP_GEMM, FP8_TFLOPS, Case, Timed, own, randn
from benchmarks.gemm_cases import LIMIT, make_weight
from kernels import quant_rows
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.quant_gemm import cuda_impl, tuning

LOCAL, HIDDEN, INNER = 64, 4096, 2048  # experts of one rank of four, Flash
PRODUCTS = {"w1|w3": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}  # name: (n, k)


def product_case(name: str, load: str, counts: Sequence[int]) -> Case:
    """One grouped product, bf16 results; ``counts`` are the rows of each expert."""
    n, k = PRODUCTS[name]
    total = sum(counts)

    def make() -> Timed:
        w = make_weight(LOCAL * n, k)
        data, scale = w.data.view(LOCAL, n, k), w.scale.view(LOCAL, n // 128, k // 128)
        offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
        rows = quant_rows(randn(total, k))
        out = torch.empty(total, n, device="cuda", dtype=torch.bfloat16)
        tile = tuning.choose_grouped(total, LOCAL)
        call = partial(cuda_impl.multiply_grouped, tile, rows, data, scale, offsets, out)
        old = (
            name == "w2"
        )  # as in the whole feed-forward: the offsets are made before the first product
        return Timed(
            calls=[partial(call, offsets_are_old=old)],
            library=library.grouped(rows, data, scale, counts, n),
        )

    return Case(
        op="expert_ffn_quant",
        shape=f"{name}, {load}: {total} rows, {LOCAL} experts, N={n} K={k}",
        make=make,
        flops=2.0 * total * n * k,
        moved=n * k * sum(c > 0 for c in counts) + total * (k + 2.0 * n),
        peak=FP8_TFLOPS,
        library=DEEP_GEMM,
    )


def whole_case(name: str, load: str, counts: Sequence[int], *, packed: bool = False) -> Case:
    """``expert_ffn_quant``: both products and the SwiGLU between them."""
    total, weights = sum(counts), 3.0 * HIDDEN * INNER

    def make() -> Timed:
        experts = random_experts(packed)
        offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
        rows = quant_rows(randn(total, HIDDEN))
        factors = torch.rand(total, device="cuda")
        call = partial(own("expert_ffn_quant"), limit=LIMIT, out_dtype=torch.bfloat16)
        return Timed(calls=[partial(call, rows, offsets, factors, experts)])

    stored = weights * (0.53125 if packed else 1.0) * sum(c > 0 for c in counts)
    return Case(
        op="expert_ffn_quant",
        shape=f"{name}, {load}: {total} rows, {LOCAL} experts, SwiGLU included",
        make=make,
        flops=2.0 * total * weights,
        moved=stored + total * 3.0 * HIDDEN,
        peak=FP8_TFLOPS,
    )


def random_experts(
    packed: bool, held: int = LOCAL, hidden: int = HIDDEN, inner: int = INNER
) -> Fp4Experts | Fp8Experts:
    """Random bytes; of two scales apart by a few powers of two, so that FP4 fits FP8."""
    device = torch.device("cuda")

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, (held, *shape), device=device, dtype=torch.uint8)

    def scales(rows: int, columns: int, low: int) -> Tensor:
        return torch.randint(low, low + 4, (held, rows, columns), device=device, dtype=torch.uint8)

    rest: dict[str, Any] = {
        "w1": (None,) * held,  # placeholders: the grouped products read the stacks alone
        "w3": (),
        "w2": (),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "device": device,
        "w13_scale": scales(2 * inner // 128, hidden // 128, 114),
        "w2_scale": scales(hidden // 128, inner // 128, 114),
        "up_row": inner,
    }
    if packed:
        return Fp4Experts(
            w13=codes(2 * inner, hidden // 2).view(torch.int8),
            w13_sub=scales(2 * inner, hidden // 32, 117),
            w2_data=codes(hidden, inner // 2).view(torch.int8),
            w2_sub=scales(hidden, inner // 32, 117),
            **rest,
        )
    # Every second code of e4m3 is finite: clear the lowest bit.
    return Fp8Experts(
        w13=(codes(2 * inner, hidden) & 0xFE).view(torch.float8_e4m3fn),
        w2_data=(codes(hidden, inner) & 0xFE).view(torch.float8_e4m3fn),
        **rest,
    )


def decode_counts(tokens: int) -> list[int]:
    """Rows of 64 local experts of 256 when ``tokens`` tokens choose six each."""
    generator = torch.Generator().manual_seed(7)
    chosen = torch.rand(tokens, 256, generator=generator).topk(6).indices.flatten()
    return [int(count) for count in torch.bincount(chosen, minlength=256)[:LOCAL]]


def prefill_counts(total: int = 49152) -> list[int]:
    """Uneven rows, between half and one and a half times the mean."""
    loads = torch.rand(LOCAL, generator=torch.Generator().manual_seed(3)) + 0.5
    counts = [int(count) for count in loads / loads.sum() * total]
    return [counts[0] + total - sum(counts), *counts[1:]]


def cases() -> Iterable[Case]:
    """Every case."""
    prefill = prefill_counts()
    decode = {f"{tokens} tokens": decode_counts(tokens) for tokens in (8, 32, 128)}
    for name in PRODUCTS:
        yield product_case(name, "prefill", prefill)
        yield product_case(name, "1-12 rows each", [1 + i % 12 for i in range(LOCAL)])
        for load, counts in decode.items():
            yield product_case(name, load, counts)
    yield whole_case("pair", "prefill", prefill)
    yield whole_case("pair", "prefill, even", [768] * LOCAL)
    for load, counts in decode.items():
        yield whole_case("pair", load, counts)
    yield whole_case("whole, FP4 weights", "prefill", prefill, packed=True)
    for load, counts in decode.items():
        yield whole_case("whole, FP4 weights", load, counts, packed=True)
