"""Rows to their experts' order on the GPU: the twin's places, rows, scales and weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.moe_permute import reference
from kernels.moe_permute.api import PermutedQuantRows, PermutedRows
from kernels.quant_rows.api import QuantRows, empty_quant_rows
from tests.helpers.gpu import DEVICE, Implementation, there
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
KINDS = ["triton", "cuda"]
IMPL = {k: Implementation(f"kernels.moe_permute.{k}_impl") for k in KINDS}


def routes(tokens: int, choices: int, experts: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, experts).argsort(1)[:, :choices]
    weights = column_slice(torch.rand(tokens, choices), 3)
    made: tuple[Tensor, Tensor] = there((ids, weights))
    return made


def same_places(
    got: PermutedRows | PermutedQuantRows, want: PermutedRows | PermutedQuantRows
) -> int:
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.place, want.place)
    count = int(want.offsets[-1])
    assert torch.equal(got.row_weight[:count], want.row_weight[:count])
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "first", "local", "columns", "gap"),
    [
        (700, 6, 256, 64, 64, 4096, 0),
        (4097, 6, 384, 0, 384, 1032, 8),
        (300, 8, 9, 8, 1, 7168, 0),
        (3000, 1, 16, 100, 3, 64, 8),
        (1000, 3, 12, 4, 4, 17, 3),
        (70_000, 6, 32, 8, 8, 16, 0),
        (9, 3, 12, 4, 4, 64, 0),
        (0, 6, 12, 4, 4, 64, 0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_twins_order(
    kind: str,
    tokens: int,
    choices: int,
    experts: int,
    first: int,
    local: int,
    columns: int,
    gap: int,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(tokens, columns).to(dtype)
    x = there(column_slice(x, gap, 2 * gap) if gap else x)
    ids, weights = routes(tokens, choices, experts)
    ids[:2] = first  # some experts twice, and ids that are none
    ids[2:4] = -1
    kwargs = {"first_expert": first, "num_local": local}
    got = IMPL[kind].moe_permute(x, ids, weights, **kwargs)
    want = reference.moe_permute(x, ids, weights, **kwargs)
    assert got.rows.shape == want.rows.shape
    count = same_places(got, want)
    assert torch.equal(got.rows[:count], want.rows[:count])


@pytest.mark.parametrize(("tokens", "columns"), [(2000, 4096), (700, 136), (5000, 7168)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twins_codes_and_scales(kind: str, tokens: int, columns: int) -> None:
    rows = empty_quant_rows(tokens, columns, DEVICE)
    bytes_of = torch.randint(0, 256, (tokens, columns), dtype=torch.uint8, device=DEVICE)
    rows.q.view(torch.uint8).copy_(bytes_of)
    rows.scale.copy_(torch.randint(0, 256, tuple(rows.scale.shape), device=DEVICE))
    ids, weights = routes(tokens, 6, 64)
    kwargs = {"first_expert": 16, "num_local": 20}
    got = IMPL[kind].moe_permute_quant(rows, ids, weights, **kwargs)
    want = reference.moe_permute_quant(rows, ids, weights, **kwargs)
    count = same_places(got, want)

    def moved(made: QuantRows) -> tuple[Tensor, Tensor]:
        return made.q.view(torch.uint8)[:count], made.scale[:count]

    for one, other in zip(moved(got.rows), moved(want.rows), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_weights_keep_their_values(kind: str) -> None:
    """``fp32_rounded`` routes with float64 weights, which no kernel may read as float32."""
    ids, weights = routes(200, 6, 64)
    x = torch.randn(200, 128, device=DEVICE, dtype=torch.float64)
    span = {"first_expert": 16, "num_local": 32}
    got = IMPL[kind].moe_permute(x, ids, weights.double(), **span)
    want = reference.moe_permute(x.cpu(), ids.cpu(), weights.double().cpu(), **span)
    count = int(want.offsets[-1])
    assert got.row_weight.dtype == torch.float64
    assert torch.equal(got.row_weight[:count].cpu(), want.row_weight[:count])
    assert torch.equal(got.rows[:count].cpu(), want.rows[:count])
