"""Rows at the edges of what floats hold, and of what routing may ask for: own kernels against the twins.

NaN and infinity stay where they are seen: a kernel that turned them into numbers would hide a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import CacheDtype, EntryKind, WindowRing, WindowRows
from kernels.dispatch import twin
from kernels.page_cache import reference as pages
from tests.kernels.op_cases import base
from tests.kernels.op_cases.base import BF16, EPS, own_kernels

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = [torch.float32, BF16]
KINDS = [(EntryKind.LATENT, 512), (EntryKind.INDEX, 128)]


@pytest.fixture(scope="module", autouse=True)
def no_backend() -> Iterator[None]:
    with own_kernels():
        yield


def edge_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Zeros, subnormals, the floors of the scales, a wide spread, large values; then NaN and infinity."""
    normal = torch.randn(width, device=CUDA)
    spread = normal * 1e-6
    spread[5] = 1e20
    rows = [torch.zeros(width, device=CUDA), -torch.zeros(width, device=CUDA), normal, spread]
    rows += [normal * size for size in (1e-39, 2.0**-126, 1e-20, 1e-4, 448.0, 2.0**64, 2.0**96)]
    rows += [torch.full((width,), size, device=CUDA) for size in (1e-4, 448.0, 450.0)]
    for value, columns in ((torch.nan, [3]), (torch.nan, [width - 1]), (torch.inf, [3])):
        rows += [normal.index_fill(0, torch.tensor(columns, device=CUDA), value)]
    rows += [torch.full((width,), torch.nan, device=CUDA), -rows[-1]]
    return torch.stack(rows).to(dtype)


def codes(rows: kernels.QuantRows) -> tuple[Tensor, Tensor]:
    """Bytes, those of NaN and of zero without their sign."""
    q = rows.q.view(torch.uint8).clone()
    q[(q & 127) == 127] = 127
    q[q == 128] = 0
    return q, rows.scale


def near(got: Tensor, want: Tensor, bound: float) -> None:
    """Row by row norm-wise within ``bound``, NaN and infinity in the same places."""
    got, want = got.flatten(1).double(), want.flatten(1).double()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num().isinf(), want.nan_to_num().isinf())
    a, b = (x.nan_to_num(posinf=0.0, neginf=0.0) for x in (got, want))
    assert bool(((a - b).norm(dim=1) <= bound * b.norm(dim=1) + 1e-40).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4096, 7168, 1000])
def test_rounding_and_norms(width: int, dtype: torch.dtype) -> None:
    x, weight = edge_rows(width, dtype), base.norm_weight(CUDA, width)
    for got, want in zip(codes(kernels.quant_rows(x)), codes(twin("quant_rows")(x)), strict=True):
        assert torch.equal(got, want)
    normed, made = kernels.rms_norm_quant(x, weight, EPS)
    near(normed, twin("rms_norm")(x, weight, EPS), 4e-3)
    for got, want in zip(codes(made), codes(twin("quant_rows")(normed)), strict=True):
        assert torch.equal(got, want)
    near(kernels.rms_norm(x, weight, EPS), twin("rms_norm")(x, weight, EPS), 4e-3)
    for up in (x, x.roll(1, 0), x.roll(7, 0)):
        near(kernels.swiglu(x, up, limit=10.0), twin("swiglu")(x, up, limit=10.0), 4e-3)
        made, exact = (op(x, up, limit=10.0) for op in (kernels.swiglu_quant, twin("swiglu_quant")))
        assert torch.equal(made.scale, exact.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_entries(kind: EntryKind, dim: int, dtype: torch.dtype) -> None:
    rows = edge_rows(dim, dtype)
    layout = base.layout(kind, CacheDtype.FP8, 64, dim, 64)
    slots = torch.randperm(128, device=CUDA)[: rows.shape[0]]
    found = []
    for store in (kernels.store_entries, twin("store_entries")):
        pool = base.empty_pool(CUDA, layout, 2)
        store(pool, layout, slots, rows)
        found.append(pages.load_entries(pool, layout, slots, torch.float32))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    got, want = kernels.round_entries(rows, layout), twin("round_entries")(rows, layout)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 512, 2048])
@pytest.mark.parametrize("columns", [7, 333, 2048, 16384, 65536, 262144])
def test_selection_of_equal_infinite_and_tiny_scores(columns: int, k: int) -> None:
    zero, at = torch.zeros(columns, device=CUDA), torch.arange(columns, device=CUDA)
    normal = torch.randn(columns, device=CUDA)
    rows = [torch.full_like(zero, value) for value in (0.0, torch.nan, torch.inf, -torch.inf, 1.0)]
    rows += [torch.where(at % 3 == step, 0.0, -0.0) for step in range(2)]
    rows += [torch.where(at == columns - 1, last, 1.0) for last in (1.0000001, 3e38, -torch.inf)]
    rows += [torch.where(at % 2 == 0, value, normal) for value in (torch.nan, torch.inf)]
    rows += [normal, normal * 1e-40, normal.clamp(-3, 3) * 1e38, normal.round(), normal.relu()]
    rows += [at.float(), -at.float(), torch.where(at == columns - 1, 0.0, -torch.inf)]
    scores = torch.stack(rows)
    first, last = (torch.randint(0, columns + 1, (len(rows),), device=CUDA) for _ in range(2))
    want = twin("topk_select")(scores, k)
    assert torch.equal(kernels.topk_select(scores, k), want)
    assert torch.equal(kernels.topk_select(scores[5:8], k), want[5:8])
    want = twin("topk_select")(scores, k, first, last)
    assert torch.equal(kernels.topk_select(scores, k, first, last), want)
    if columns <= 8192:
        indices = torch.rand(scores.shape, device=CUDA).argsort(1).to(torch.int32) * 3
        indices[:, ::5] = -1
        got = kernels.topk_merge(scores, indices, k)
        assert torch.equal(got, twin("topk_merge")(scores, indices, k))


ROUTES: dict[str, Callable[[int], Tensor]] = {
    "all to one expert": lambda n: torch.full((n, 6), 65, device=CUDA),
    "none here": lambda n: torch.zeros(n, 6, dtype=torch.int64, device=CUDA),
    "no expert at all": lambda n: torch.full((n, 6), -1, device=CUDA),
    "the same expert twice": lambda n: torch.randint(64, 67, (n, 6), device=CUDA),
    "outside 32 bits": lambda n: (torch.randint(0, 6, (n, 6), device=CUDA) << 32) + 64,
    "anything": lambda n: torch.randint(-(1 << 40), 1 << 40, (n, 6), device=CUDA),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_routes(tokens: int, route: str) -> None:
    x, ids = torch.randn(tokens, 4096, device=CUDA).to(BF16), ROUTES[route](tokens)
    span = {"first_expert": 64, "num_local": 64}
    weights = torch.rand(tokens, 6, device=CUDA)
    got = kernels.moe_permute(x, ids, weights, **span)
    want = twin("moe_permute")(x, ids, weights, **span)
    count = int(want.offsets[-1])
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.place, want.place)
    assert torch.equal(got.rows[:count], want.rows[:count])
    assert torch.equal(got.row_weight[:count], want.row_weight[:count])


@pytest.mark.parametrize(
    ("ratio", "dim", "index"), [(4, 512, False), (4, 128, True), (128, 512, False)]
)
def test_pooling(ratio: int, dim: int, index: bool) -> None:
    """Gates of infinity in both directions, of NaN, far apart; a group without rows, or with one."""
    series = 2 if ratio == 4 else 1
    count, half = series * ratio, series * dim
    rows = torch.randn(400, 2 * half, device=CUDA)
    rows[0] = torch.nan
    rows[1, half:], rows[2, half:], rows[3, half:] = torch.inf, -torch.inf, 1e38
    rows[4, :half], rows[5, half:] = torch.inf, -1e38
    rows[100:300, half:] = -torch.inf
    picked = torch.randint(300, 400, (12, count), device=CUDA)
    for entry in range(6):
        picked[entry, entry % count] = entry
    picked[6], picked[7] = -1, torch.arange(100, 100 + count, device=CUDA)
    picked[8, 1:] = picked[9, :-1] = -1
    picked[10] = 333
    positions = torch.tensor([0, 4, 1 << 20, (1 << 21) + 8] * 3, device=CUDA)
    weight, freq = base.norm_weight(CUDA, dim), base.frequencies(CUDA)
    for dtype, bound in ((torch.float32, 1e-5), (BF16, 6e-3)):
        how: dict[str, Any] = {"ratio": ratio, "index": index, "quantize": False, "dtype": dtype}
        args = (rows, picked, weight, positions, freq, EPS)
        near(kernels.compress(*args, **how), twin("compress")(*args, **how), bound)


@pytest.mark.parametrize("heads", [6, 64, 128])
@pytest.mark.parametrize("ring", [False, True])
def test_attention_of_nan_is_nan(ring: bool, heads: int) -> None:
    """A head whose query is not a number; beside it rows of zeros, without keys, with only a sink."""
    q = torch.randn(6, heads, 512, device=CUDA).to(BF16)
    q[0] = 0
    q[1, 0, 5], q[2, heads - 1, 7] = torch.nan, torch.inf
    sink = torch.randn(heads, device=CUDA)
    keys: WindowRows | WindowRing
    if ring:
        layout = base.layout(EntryKind.LATENT, CacheDtype.FP8, 132, 512, 64)
        pool = base.filled_pool(CUDA, layout, 6, torch.arange(6, device=CUDA))
        slots = torch.arange(132, device=CUDA) + 132 * torch.arange(6, device=CUDA)[:, None]
        slots[3] = -1
        keys = WindowRing(pool=pool, layout=layout, slots=slots[:, :128].contiguous())
    else:
        kv, start = torch.randn(200, 512, device=CUDA).to(BF16), torch.arange(6, device=CUDA)
        length = torch.tensor([128, 128, 100, 0, 1, 64], device=CUDA)
        keys = WindowRows(kv=kv, start=start, length=length)
    args = {"sink": sink, "scale": 512**-0.5}
    o, lse = kernels.sparse_attention(q, keys, None, **args)
    want_o, want_lse = twin("sparse_attention")(q, keys, None, **args)
    near(o, want_o, 8e-3)
    near(lse, want_lse, 1e-4)
    assert not o[3].any()


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_merge_of_nan_is_nan(parts: int) -> None:
    o, lse = torch.randn(parts, 7, 5, 512, device=CUDA), torch.randn(parts, 7, 5, device=CUDA)
    lse[:, 0], lse[0, 1], lse[:, 2], lse[:, 3] = -torch.inf, torch.nan, torch.nan, 1e30
    o[:, 0], o[0, 4, 0] = torch.nan, torch.nan
    lse[0, 5] = -torch.inf
    for sink in (None, torch.randn(5, device=CUDA)):
        for got, want in zip(
            kernels.merge_lse(o, lse, sink), twin("merge_lse")(o, lse, sink), strict=True
        ):
            near(got, want, 1e-5)


@pytest.mark.parametrize("columns", [1, 100, 32320, 129280])
def test_sampling(columns: int) -> None:
    """Rows that cannot be sampled from say so; extreme temperatures and logits draw the twin's tokens."""
    logits = 3 * torch.randn(14, columns, device=CUDA)
    logits[0], logits[1, columns // 2], logits[2, columns // 2] = -torch.inf, torch.nan, torch.inf
    logits[3], logits[4], logits[5], logits[6, 1:] = 0.0, 1e30, -1e30, -torch.inf
    logits[7] *= 1e4
    logits[8, : columns // 2] = -torch.inf
    temperature = torch.ones(14, device=CUDA)
    temperature[9:13] = torch.tensor([1e-6, 1e-40, 100.0, 0.0], device=CUDA)
    seeds, steps = torch.randint(-(1 << 62), 1 << 62, (2, 14), device=CUDA)
    where: dict[str, Any] = {"vocab_offset": 7, "vocab_size": 7 + columns}
    for heat in (temperature, torch.zeros_like(temperature)):
        got = kernels.sample_partial(logits, heat, seeds, steps, **where)
        want = twin("sample_partial")(logits, heat, seeds, steps, **where)
        fine = want.lse.isfinite()
        assert torch.equal(got.lse.isfinite(), fine)
        assert fine[3:].all()
        assert not fine[:3].any()
        assert torch.equal(got.ids[fine], want.ids[fine])
        near(got.lse[fine][:, None], want.lse[fine][:, None], 1e-5)
