"""Router, rows' way to their experts and back, SwiGLU: shapes of V4-Flash and V4-Pro, four ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Call, Case, against_twin, alone, integers, randn, row_case
from kernels import quant_rows

MODELS, ROWS, CHOICES = ((4096, 256, 2048), (7168, 384, 3072)), (1, 8, 32, 128, 16384), 6
VOCAB = 129280


def cases() -> Iterator[Case]:
    """Every case, few rows first."""
    for rows in ROWS:
        for width, experts, inner in MODELS:
            yield from _gate(rows, width, experts)
            yield from _ways(rows, width, experts)
            yield _swiglu(rows, inner)


def _gate(t: int, d: int, experts: int) -> Iterator[Case]:
    moved = 2.0 * (t + experts) * d + t * CHOICES * 12

    def weight() -> Tensor:
        return randn(experts, d).mul_(d**-0.5)

    def scored() -> tuple[Call, Call]:
        bias = randn(experts, dtype=torch.float32) * 0.1
        return against_twin(
            "moe_gate", randn(t, d), weight(), k=CHOICES, route_scale=1.5, bias=bias
        )

    def hashed() -> tuple[Call, None]:
        tables = {"tid2eid": integers(experts, VOCAB, CHOICES), "token_ids": integers(VOCAB, t)}
        return alone("moe_gate", randn(t, d), weight(), k=CHOICES, route_scale=1.5, **tables)

    shape = f"{t}x{d}x{experts}"
    yield row_case("moe_gate", shape, scored, moved=moved)
    if t == 1:
        yield row_case(
            "moe_gate", f"{shape} hash", hashed, moved=moved, held=moved + VOCAB * CHOICES * 8
        )


def _ways(t: int, d: int, experts: int) -> Iterator[Case]:
    here, shape = CHOICES / 4, f"{t}x{d} ep4"  # choices of a token that stay on this rank
    where = {"first_expert": experts // 4, "num_local": experts // 4}

    def routes() -> tuple[Tensor, Tensor]:
        ids = torch.rand(t, experts, device="cuda").argsort(1)[:, :CHOICES].sort(1).values
        return ids, torch.rand(t, CHOICES, device="cuda")

    def permute() -> tuple[Call, None]:
        return alone("moe_permute", randn(t, d), *routes(), **where)

    def permute_quant() -> tuple[Call, None]:
        return alone("moe_permute_quant", quant_rows(randn(t, d)), *routes(), **where)

    def unpermute() -> tuple[Call, None]:
        place = integers(t * CHOICES, t, CHOICES)
        place[integers(4, t, CHOICES) > 0] = -1
        rows, shared = randn(t * CHOICES, d), randn(t, d)
        return alone("moe_unpermute", rows, place, shared, torch.bfloat16)

    row, codes = 2.0 * t * d, t * d * (1 + 1 / 128)
    yield row_case("moe_permute", shape, permute, moved=row * (1 + here), held=row * 7)
    yield row_case(
        "moe_permute_quant", shape, permute_quant, moved=codes * (1 + here), held=codes * 7
    )
    yield row_case("moe_unpermute", shape, unpermute, moved=row * (2 + here), held=row * 8)


def _swiglu(t: int, inner: int) -> Case:
    def make() -> tuple[Call, Call]:
        return against_twin("swiglu", *randn(t, 2 * inner).chunk(2, 1), limit=10.0)

    return row_case("swiglu", f"{t}x{inner}", make, moved=6.0 * t * inner)
