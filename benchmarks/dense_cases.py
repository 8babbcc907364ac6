"""Products with plain bf16 weights, and the grouped output projection; cuBLAS on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Timed, integers, own, randn, sets
from kernels import BlockWeight, PreparedWeight, prepare_weight

CUBLAS = "cuBLAS (torch)"
WEIGHTS = {  # name: (n, k)
    "CSA compressors and index weights": (2624, 4096),
    "HCA compressor": (1024, 4096),
    "LM head / 4": (32320, 4096),
    "pro CSA compressors and index weights": (2624, 7168),
}
_RANK, _HEADS, _DIM = 1024, 8, 512  # of a group: rows of wo_a, heads, their columns


def _prepared(n: int, k: int) -> PreparedWeight:
    return prepare_weight(BlockWeight(randn(n, k) * 0.02))


def linear_case(name: str, m: int) -> Case:
    """One weight at ``m`` rows, float32 results."""
    n, k = WEIGHTS[name]
    moved = 2.0 * n * k + m * (2.0 * k + 4.0 * n)

    def make() -> Timed:
        x = randn(m, k)
        weights = sets(2.0 * n * k if m <= 1024 else moved, partial(_prepared, n, k))
        f32 = torch.float32
        return Timed(
            calls=[partial(own("linear"), x, w, quantize=False, out_dtype=f32) for w in weights],
            library=[partial(torch.mm, x, w.matrix.t(), out_dtype=f32) for w in weights],
        )

    return Case(
        op="linear",
        shape=f"{name} M={m} N={n} K={k}",
        make=make,
        flops=2.0 * m * n * k,
        moved=moved,
        library=CUBLAS,
    )


def grouped_case(op: str, tokens: int, groups: int) -> Case:
    """``groups`` groups of Flash (Pro's are alike)."""
    k = _HEADS * _DIM
    weight = 2.0 * groups * _RANK * k
    out = (1.0 + 1 / 128 if op.endswith("quant") else 2.0) * tokens * groups * _RANK
    moved = weight + 2.0 * tokens * groups * k + out

    def make() -> Timed:
        o = randn(tokens, groups * _HEADS, _DIM)
        positions = integers(1 << 20, tokens)
        inv_freq = (10_000.0 ** -(torch.arange(32, device="cuda") / 32)).float()
        held = weight if tokens <= 1024 else moved
        weights = sets(held, partial(_prepared, groups * _RANK, k))
        turned = o.view(tokens, groups, k).transpose(0, 1).contiguous()
        return Timed(
            calls=[partial(own(op), o, positions, inv_freq, w, groups) for w in weights],
            library=[partial(torch.bmm, turned, _transposed(w, groups)) for w in weights],
        )

    return Case(
        op=op,
        shape=f"T={tokens}, {groups} groups of [{_RANK}, {k}]",
        make=make,
        flops=2.0 * tokens * groups * _RANK * k,
        moved=moved,
        library=f"{CUBLAS}: the product alone",
    )


def _transposed(w: PreparedWeight, groups: int) -> Tensor:
    return w.matrix.view(groups, _RANK, -1).transpose(1, 2)


def cases() -> Iterable[Case]:
    """Every case."""
    for m in (1, 16, 32, 64, 128, 1024, 8192, 16384):
        yield linear_case("CSA compressors and index weights", m)
    for m in (1, 32, 128, 8192):
        yield linear_case("HCA compressor", m)
        yield linear_case("pro CSA compressors and index weights", m)
    for m in (1, 16, 64, 128, 512):
        yield linear_case("LM head / 4", m)
    for op in ("grouped_output", "grouped_output_quant"):
        for tokens, groups in ((1, 2), (8, 2), (32, 2), (128, 2), (32, 8), (1024, 8), (4096, 8)):
            yield grouped_case(op, tokens, groups)
