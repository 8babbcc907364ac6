"""Rows to their experts' order and back, against loops."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    KernelContractError,
    QuantRows,
    moe_permute,
    moe_permute_quant,
    moe_unpermute,
    quant_rows,
)
from tests.helpers.strided import column_slice, microseconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "first", "local"),
    [(9, 3, 12, 4, 4), (5, 2, 6, 0, 6), (4, 1, 8, 7, 1), (0, 2, 4, 0, 4), (3, 2, 9, 100, 3)],
)
def test_rows_lie_by_expert_then_token_then_choice(
    tokens: int, k: int, experts: int, first: int, local: int, dtype: torch.dtype
) -> None:
    x = column_slice(torch.randn(tokens, 16).to(dtype))
    ids = torch.rand(tokens, experts).argsort(1)[:, :k]
    weights = torch.rand(tokens, k)
    got = moe_permute(x, ids, weights, first_expert=first, num_local=local)
    assert got.rows.shape == (tokens * k, 16)
    at = 0
    for expert in range(local):
        assert int(got.offsets[expert]) == at
        for t in range(tokens):
            for choice in range(k):
                if int(ids[t, choice]) == first + expert:
                    assert torch.equal(got.rows[at], x[t])
                    assert float(got.row_weight[at]) == float(weights[t, choice])
                    assert int(got.place[t, choice]) == at
                    at += 1
    assert int(got.offsets[-1]) == at
    elsewhere = (ids < first) | (ids >= first + local)
    assert bool((got.place[elsewhere] == -1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_adds_in_the_order_of_the_choices(dtype: torch.dtype) -> None:
    rows = torch.randn(7, 16).to(dtype)
    rows[6] = float("nan")  # nobody's row
    place = torch.tensor([[3, -1, 0], [-1, -1, -1], [5, 1, 2]])
    shared = torch.randn(3, 16).to(dtype)
    got = moe_unpermute(rows, place)
    assert got.dtype == torch.float32
    r = rows.float()
    assert torch.equal(got[0], r[3] + r[0])
    assert torch.equal(got[1], torch.zeros(16))
    assert torch.equal(got[2], (r[5] + r[1]) + r[2])
    added = moe_unpermute(rows, place, shared, torch.bfloat16)
    assert torch.equal(added, (got + shared.float()).bfloat16())


@pytest.mark.parametrize("tokens", [7, 0])
def test_quantised_rows_go_where_plain_rows_go(tokens: int) -> None:
    x = torch.randn(tokens, 136)
    ids, weights = torch.rand(tokens, 9).argsort(1)[:, :3], torch.rand(tokens, 3)
    rows = quant_rows(x)
    got = moe_permute_quant(rows, ids, weights, first_expert=2, num_local=4)
    want = moe_permute(rows.values(), ids, weights, first_expert=2, num_local=4)
    assert got.rows.shape == (tokens * 3, 136)
    count = int(want.offsets[-1])
    assert torch.equal(got.rows.values()[:count], want.rows[:count])
    for name in ("offsets", "place"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.row_weight[:count], want.row_weight[:count])


def test_there_and_back() -> None:
    x, ids = torch.randn(8, 16), torch.rand(8, 4).argsort(1)[:, :2]
    went = moe_permute(x, ids, torch.ones(8, 2), first_expert=0, num_local=4)
    torch.testing.assert_close(moe_unpermute(went.rows, went.place), 2 * x)


def test_contract() -> None:
    x, ids, weights = torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.int64), torch.rand(2, 3)
    with pytest.raises(KernelContractError, match=r"weights: expected shape \[2, 3\]"):
        moe_permute(x, ids, weights[:, :2], first_expert=0, num_local=1)
    with pytest.raises(KernelContractError, match="num_local >= 1, got 0 and 0"):
        moe_permute(x, ids, weights, first_expert=0, num_local=0)
    rows = quant_rows(x)
    with pytest.raises(KernelContractError, match=r"quant: ids: expected shape \[2, "):
        moe_permute_quant(rows, ids[:1], weights[:1], first_expert=0, num_local=1)
    shifted = QuantRows(q=rows.q, scale=rows.scale, col_offset=3)
    with pytest.raises(KernelContractError, match="expected col_offset 0, got 3"):
        moe_permute_quant(shifted, ids, weights, first_expert=0, num_local=1)
    with pytest.raises(KernelContractError, match="dtype torch"):
        moe_unpermute(x, ids, dtype=torch.float16)
    with pytest.raises(KernelContractError, match=r"shared: expected shape \[2, 8\]"):
        moe_unpermute(x, ids, shared=torch.randn(2, 4))


@pytest.mark.benchmark
def test_speed() -> None:
    x, ids, weights = (
        torch.randn(256, 64),
        torch.rand(256, 32).argsort(1)[:, :6],
        torch.rand(256, 6),
    )
    us = microseconds(lambda: moe_permute(x, ids, weights, first_expert=0, num_local=8))
    print(f"moe_permute 256x64: {us:.0f} us")
