"""Hyper-connections and RMSNorm: shapes of V4-Flash and V4-Pro, few rows and a prefill chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Call, Case, against_twin, alone, randn, row_case

WIDTHS, ROWS = (4096, 7168), (1, 8, 32, 128, 16384)
PRE = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
F32 = torch.float32


def cases() -> Iterator[Case]:
    """Every case, few rows first."""
    for rows in ROWS:
        for width in WIDTHS:
            yield from _sub_layer(rows, width)
            yield _norm(rows, width)


def _mix(d: int) -> tuple[Tensor, Tensor, Tensor]:
    fn = randn(24, 4 * d, dtype=F32) * (4 * d) ** -0.5
    return fn, randn(3, dtype=F32), randn(24, dtype=F32)


def _sub_layer(t: int, d: int) -> Iterator[Case]:
    row, weight, shape = 2.0 * t * d, 24 * 4 * d * 4.0, f"{t}x4x{d}"
    codes = t * d * (1 + 1 / 128)

    def before() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return randn(t, d), randn(t, 4, d), randn(t, 4, dtype=F32), randn(t, 4, 4, dtype=F32)

    def pre() -> tuple[Call, Call]:
        return against_twin("hc_pre", randn(t, 4, d), *_mix(d), **PRE)

    def pre_norm() -> tuple[Call, None]:
        weight = randn(d)
        return alone("hc_pre_norm", randn(t, 4, d), *_mix(d), weight, rms_eps=1e-6, **PRE)

    def post() -> tuple[Call, Call]:
        return against_twin("hc_post", *before())

    def post_pre() -> tuple[Call, None]:
        return alone("hc_post_pre", *before(), *_mix(d), **PRE)

    def post_pre_norm() -> tuple[Call, None]:
        return alone("hc_post_pre_norm", *before(), *_mix(d), randn(d), rms_eps=1e-6, **PRE)

    def head() -> tuple[Call, None]:
        fn, scale, base = _mix(d)
        args = (fn[:4].contiguous(), scale[:1], base[:4])
        return alone("hc_head", randn(t, 4, d), *args, eps=1e-6, norm_eps=1e-6)

    yield row_case("hc_pre", shape, pre, moved=row * 5 + weight)
    yield row_case("hc_pre_norm", shape, pre_norm, moved=row * 5 + weight + codes)
    yield row_case("hc_post", shape, post, moved=row * 9)
    yield row_case("hc_post_pre", shape, post_pre, moved=row * 10 + weight)
    yield row_case("hc_post_pre_norm", shape, post_pre_norm, moved=row * 10 + weight + codes)
    yield row_case("hc_head", shape, head, moved=row * 5 + weight / 6)


def _norm(t: int, d: int) -> Case:
    def make() -> tuple[Call, Call]:
        return against_twin("rms_norm", randn(t, d), randn(d), 1e-6)

    return row_case("rms_norm", f"{t}x{d}", make, moved=4.0 * t * d)
