"""Ops that end in a rounding step, without it: own kernels against the twins in float64.

With the step a value at the edge of two codes may fall to either side, which hides errors of this size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import CacheDtype, CompressPart, EntryKind
from kernels.dispatch import twin
from kernels.page_cache import reference as pages
from tests.helpers.gpu import norm_error
from tests.kernels.op_cases import base
from tests.kernels.op_cases.base import BF16, EPS

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
COUNT = 70
# One rounding to bfloat16 (a norm in bfloat16 has four), or sums and angles of float32.
BOUNDS = {BF16: 3e-3, torch.float32: 1e-6}
DTYPES = list(BOUNDS)
DIMS = [(512, 64), (128, 64), (80, 16)]


def wide(x: Tensor) -> Tensor:
    """The same values in float64."""
    return x.double()


def near(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    error = norm_error(got, want)
    assert error < bound, f"error {error}, allowed {bound}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rope"), DIMS)
def test_latents(dim: int, rope: int, dtype: torch.dtype) -> None:
    freq, weight = base.frequencies(CUDA, rope), base.norm_weight(CUDA, dim)
    at, kv = base.positions(CUDA, COUNT), base.normal(CUDA, COUNT, dim, dtype=dtype)
    want = twin("kv_norm_rope")(wide(kv), weight, at, freq, EPS, quantize=False)
    got = kernels.kv_norm_rope(kv, weight, at, freq, EPS, quantize=False)
    near(got, want, BOUNDS[dtype])
    layout = base.layout(EntryKind.LATENT, CacheDtype.FP32, 16, dim, rope)
    pool, slots = base.empty_pool(CUDA, layout, 5), torch.randperm(80, device=CUDA)[:COUNT]
    got = kernels.kv_insert(kv, weight, at, freq, EPS, pool, layout, slots, quantize=False)
    near(got, want, BOUNDS[dtype])
    near(pages.load_entries(pool, layout, slots, torch.float32), want, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [64, 128, 5])
def test_queries_and_latents(heads: int, dtype: torch.dtype) -> None:
    freq, weight = base.frequencies(CUDA), base.norm_weight(CUDA, 512)
    at, kv = base.positions(CUDA, COUNT), base.normal(CUDA, COUNT, 512, dtype=dtype)
    q = base.normal(CUDA, COUNT, heads, 512, dtype=dtype)
    index = base.normal(CUDA, COUNT, 64, 128, dtype=dtype)
    layout = base.layout(EntryKind.LATENT, CacheDtype.FP32, 16, 512, 64)
    slots = torch.randperm(80, device=CUDA)[:COUNT]

    def run(op: Any, *values: Tensor) -> tuple[Tensor, ...]:
        pool = base.empty_pool(CUDA, layout, 5)
        first, second, third = values
        made = op(
            first, second, weight, at, freq, EPS, pool, layout, slots, quantize=False, index_q=third
        )
        return (*made, pages.load_entries(pool, layout, slots, torch.float32))

    got = run(kernels.qkv_norm_rope, q, kv, index)
    want = run(twin("qkv_norm_rope"), wide(q), wide(kv), wide(index))
    for part, (mine, exact) in enumerate(zip(got, want, strict=True)):
        near(mine, exact, 1.2e-2 if part == 0 and dtype is BF16 else BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (5, 64), (3, 40)])
def test_index_queries(heads: int, dim: int, dtype: torch.dtype) -> None:
    freq, at = base.frequencies(CUDA, 32 if dim < 64 else 64), base.positions(CUDA, COUNT)
    q = base.normal(CUDA, COUNT, heads, dim, dtype=dtype)
    want = twin("index_query")(wide(q), at, freq, quantize=False)
    near(kernels.index_query(q, at, freq, quantize=False), want, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(EntryKind))
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(("dim", "rope"), DIMS)
def test_pooled_entries(
    dim: int, rope: int, ratio: int, kind: EntryKind, dtype: torch.dtype
) -> None:
    """As rows, into pages, and out of the rings of a decode step whose every sequence ends a group."""
    series = 2 if ratio == 4 else 1
    width, pooled = 2 * series * dim, series * ratio
    freq, weight = base.frequencies(CUDA, rope), base.norm_weight(CUDA, dim)
    layout = base.layout(kind, CacheDtype.FP32, 16, dim, rope)
    slots = torch.randperm(80, device=CUDA)[:COUNT]
    group = torch.randint(2, (1 << 20) // ratio, (COUNT,), device=CUDA) * ratio
    ring = pooled + 1
    state = base.normal(CUDA, COUNT * ring, width)
    base_row = torch.arange(COUNT, device=CUDA) * ring
    last = group + ratio - 1
    back = last[:, None] - pooled + 1 + torch.arange(pooled, device=CUDA)
    index = base_row[:, None] + back % ring
    how: dict[str, Any] = {"ratio": ratio, "quantize": False}
    rest = (weight, group, freq, EPS)
    want = twin("compress")(
        state, index, *rest, **how, index=kind is EntryKind.INDEX, dtype=torch.float64
    )
    bound = BOUNDS[dtype] * (1 if dtype is BF16 else 4)  # exponentials of gates up to 30 apart
    got = kernels.compress(state, index, *rest, **how, index=kind is EntryKind.INDEX, dtype=dtype)
    near(got, want, bound)
    pool = base.empty_pool(CUDA, layout, 5)
    kernels.compress_insert(state, index, *rest, pool, layout, slots, **how, dtype=dtype)
    near(pages.load_entries(pool, layout, slots, torch.float32), want, bound)
    # The step brings the last row of each group, its gate less what is added to it.
    ape = torch.randn(ratio, width // 2, device=CUDA)
    own = base_row + last % ring
    rows = state[own].clone()
    rows[:, width // 2 :] -= ape[ratio - 1]
    kept = state[own].clone()
    kept[:, width // 2 :] = rows[:, width // 2 :] + ape[ratio - 1]
    state[own] = kept
    want = twin("compress")(
        state, index, *rest, **how, index=kind is EntryKind.INDEX, dtype=torch.float64
    )
    state[own] = torch.nan
    pool = base.empty_pool(CUDA, layout, 5)
    part = CompressPart(ape=ape, norm_weight=weight, pool=pool, layout=layout, slots=slots)
    kernels.compress_decode(
        rows,
        state,
        (part,),
        last,
        torch.arange(COUNT, device=CUDA),
        base_row,
        **how,
        ring_rows=ring,
        inv_freq=freq,
        eps=EPS,
        dtype=dtype,
    )
    assert torch.equal(state[own], kept)
    near(pages.load_entries(pool, layout, slots, torch.float32), want, bound)
