"""Router and row permutation on the GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.moe_gate import reference as gate_reference
from kernels.moe_permute import reference as permute_reference
from kernels.quant_rows import reference as quant_reference
from kernels.quant_rows.api import QuantRows
from tests.helpers.gpu import Implementation, assert_near, assert_rows_alone, there
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
GATES = [Implementation(f"kernels.moe_gate.{name}_impl") for name in ("cuda", "triton")]
gate = GATES[0]
permute = Implementation("kernels.moe_permute.triton_impl")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bias", "plain", "hash"])
@pytest.mark.parametrize(
    ("tokens", "dim", "experts", "k"),
    [
        (7, 4096, 256, 6),
        (300, 4096, 256, 6),
        (200, 7168, 384, 6),
        (30, 7168, 384, 6),
        (64, 4096, 256, 6),
        (5, 300, 24, 3),
        (70, 300, 24, 3),
        (20, 75, 511, 32),
        (0, 64, 8, 2),
    ],
)
@pytest.mark.parametrize("gate", GATES, ids=["cuda", "triton"])
def test_moe_gate(
    gate: Implementation,
    tokens: int,
    dim: int,
    experts: int,
    k: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(tokens, dim).to(dtype)
    weight = (torch.randn(experts, dim) * dim**-0.5 * 2).to(dtype)
    kwargs = {"k": k, "route_scale": 1.5}
    bias = torch.randn(experts) * 0.1 if kind == "bias" else None
    if kind == "hash":
        kwargs["tid2eid"] = torch.rand(90, experts).argsort(1)[:, :k]
        kwargs["token_ids"] = torch.randint(0, 90, (tokens,))
    logits = torch.nn.functional.linear(x.double(), weight.double())
    scores = gate_reference._scores(logits)
    device = {name: there(v) for name, v in kwargs.items()}
    x, weight, bias = there(column_slice(x)), there(weight), there(bias)
    ids, w = gate.moe_gate(x, weight, bias=bias, **device)
    assert (ids.dtype, w.dtype) == (torch.int64, torch.float32)
    assert bool((ids[:, 1:] >= ids[:, :-1]).all())
    if kind == "hash":
        want = kwargs["tid2eid"][kwargs["token_ids"]].sort(1).values
        assert torch.equal(ids.cpu(), want)
    else:
        biased = scores if bias is None else scores + bias.cpu().double()
        best = biased.sort(dim=-1, descending=True).values
        chosen = biased.gather(1, ids.cpu())
        # The k best, but for ties within the f32 error of a logit.
        if tokens:
            assert float((best[:, k - 1 : k] - chosen).max()) < 1e-5
            assert bool((ids[:, 1:] > ids[:, :-1]).all())
    mine = scores.gather(1, ids.cpu())
    assert_near(w, (mine / mine.sum(-1, keepdim=True) * 1.5).float(), bound=3e-6)

    def alone(s: slice, part: int) -> torch.Tensor:
        one = dict(device)
        if kind == "hash":
            one["token_ids"] = device["token_ids"][s]
        return gate.moe_gate(x[s], weight, bias=bias, **one)[part]

    rows = sorted({0, tokens // 2, tokens - 1}) if tokens else []
    for part, result in enumerate((ids, w)):
        assert_rows_alone(lambda s, p=part: alone(s, p), result, rows)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(
    ("dim", "experts", "k"), [(4096, 256, 6), (7168, 384, 6), (200, 24, 3), (1032, 509, 31)]
)
def test_one_launch_and_two_give_the_same_bits(
    dim: int, experts: int, k: int, hashed: bool
) -> None:
    x = there(torch.randn(130, dim).to(torch.bfloat16))
    weight = there((torch.randn(experts, dim) * dim**-0.5 * 2).to(torch.bfloat16))
    if hashed:
        table = there(torch.rand(90, experts).argsort(1)[:, :k].to(torch.int32))
        tokens = there(torch.randint(0, 90, (130,)))

    def run(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        ways = {"tid2eid": table, "token_ids": tokens[first:last]} if hashed else {"bias": bias}
        ids, weights = gate.moe_gate(x[first:last], weight, k=k, route_scale=1.5, **ways)
        return ids, weights

    bias = there(torch.randn(experts) * 0.1)
    want = run(0, 130)
    # Launches of several shapes in turn: words that one leaves behind are not the next one's.
    for count in (1, 16, 17, 5, 32, 33, 64, 65, 2, 64, 1):
        for first in (0, 130 - count):
            got = run(first, first + count)
            for mine, all_rows in zip(got, want, strict=True):
                assert torch.equal(mine, all_rows[first : first + count]), (count, first)


@pytest.mark.parametrize("tokens", [4, 100])
def test_equal_scores_infinities_and_nan(tokens: int) -> None:
    weight = torch.zeros(384, 64)
    weight[:, 0] = torch.randint(-3, 4, (384,)).float()  # many ties
    x = torch.zeros(tokens, 64)
    x[:, 0] = torch.tensor([1.0, -1.0, float("nan"), 300.0]).repeat(tokens // 4)
    x, weight = (v.to(torch.bfloat16) for v in (x, weight))
    want, _ = gate_reference.moe_gate(x, weight, k=6, route_scale=1.5)
    ids, w = gate.moe_gate(there(x), there(weight), k=6, route_scale=1.5)
    assert torch.equal(ids.cpu(), want)
    assert bool(w[2::4].isnan().all())
    keep = torch.arange(tokens) % 4 != 2
    assert bool(torch.isfinite(w.cpu()[keep]).all())
    torch.testing.assert_close(w.cpu()[keep].sum(1), torch.full((int(keep.sum()),), 1.5))


@pytest.mark.parametrize("tokens", [3, 80])
def test_captured_on_other_rows(tokens: int) -> None:
    x = there(torch.randn(tokens, 4096).to(torch.bfloat16))
    weight = there((torch.randn(256, 4096) / 32).to(torch.bfloat16))
    other = there(torch.randn(tokens, 4096).to(torch.bfloat16))
    want = [gate.moe_gate(rows, weight, k=6, route_scale=1.5) for rows in (x, other)]
    graph = torch.cuda.CUDAGraph()
    rows = x.clone()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = gate.moe_gate(rows, weight, k=6, route_scale=1.5)
    for turn in range(6):
        rows.copy_((x, other)[turn % 2])
        graph.replay()
        for mine, expected in zip(got, want[turn % 2], strict=True):
            assert torch.equal(mine, expected), turn


def test_ties_extremes_and_ids_outside_the_table() -> None:
    # Logits of one feature: all equal, then -200 .. 200.
    weight = torch.cat(
        [torch.zeros(8, 16), torch.linspace(-200, 200, 8)[:, None].expand(8, 16) / 16]
    )
    x, weight = there((torch.ones(2, 16), weight))
    x[0] = 0
    ids, w = gate.moe_gate(x, weight, k=4, route_scale=2.0)
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert torch.isfinite(w).all()
    torch.testing.assert_close(w.sum(1).cpu(), torch.full((2,), 2.0))
    low, _ = gate.moe_gate(-x.abs() - 1, weight.abs() + 3, k=4, route_scale=2.0)
    assert low.shape == (2, 4)
    table = there(torch.arange(12).view(3, 4))
    for dtype in DTYPES:
        for repeat in (1, 50):
            rows = x.to(dtype).repeat(repeat, 1)
            tokens = there(torch.tensor([1, 9]).repeat(repeat))
            _, w = gate.moe_gate(
                rows, weight.to(dtype), k=4, route_scale=1.0, tid2eid=table, token_ids=tokens
            )
            assert bool(torch.isfinite(w[::2]).all())
            assert bool(w[1::2].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [41, 164])  # one launch, and two
@pytest.mark.parametrize("gate", GATES, ids=["cuda", "triton"])
def test_weights_of_logits_from_minus_to_plus_200(
    gate: Implementation, tokens: int, dtype: torch.dtype
) -> None:
    """One feature, so a logit is exact: every row has other levels (sglang 34459)."""
    x = torch.zeros(tokens, 4096)
    x[:, 5] = torch.linspace(-200, 200, tokens)
    weight = torch.zeros(256, 4096)
    weight[:, 5] = torch.linspace(-1, 1, 256)
    x, weight = x.to(dtype), weight.to(dtype)
    ids, w = gate.moe_gate(there(x), there(weight), k=6, route_scale=1.5)
    want_ids, want = gate_reference.moe_gate(x.double(), weight.double(), k=6, route_scale=1.5)
    assert torch.equal(ids.cpu(), want_ids)
    assert_near(w, want.float(), bound=3e-6)


@pytest.mark.parametrize("gate", GATES, ids=["cuda", "triton"])
@pytest.mark.parametrize("tokens", [9, 90])
def test_experts_of_a_poisoned_row_exist(gate: Implementation, tokens: int) -> None:
    """Padding may hold anything; what it routes to must lie in the table of experts (vllm 50844)."""
    x = torch.randn(tokens, 4096)
    x[::3] = torch.nan
    x[1::3, 7] = torch.inf
    weight = torch.randn(256, 4096)
    for dtype in DTYPES:
        rows, matrix = there((x.to(dtype), weight.to(dtype)))
        ids, w = gate.moe_gate(rows, matrix, k=6, route_scale=1.5, bias=there(torch.randn(256)))
        assert bool(((ids >= 0) & (ids < 256)).all())
        assert bool((ids[:, 1:] > ids[:, :-1]).all())
        assert bool(w[::3].isnan().all())
        assert bool(w[2::3].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "first", "local"),
    [
        (5, 3, 24, 6, 6),
        (150, 6, 256, 64, 64),
        (3000, 6, 256, 0, 256),
        (1, 1, 1, 0, 1),
        (0, 6, 8, 0, 8),
    ],
)
def test_permute(
    tokens: int, k: int, experts: int, first: int, local: int, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, 72).to(dtype)
    ids = torch.rand(tokens, experts).argsort(1)[:, :k].sort(1).values
    weights = torch.rand(tokens, k)
    want = permute_reference.moe_permute(x, ids, weights, first_expert=first, num_local=local)
    got = permute.moe_permute(
        there(column_slice(x)), there(ids), there(weights), first_expert=first, num_local=local
    )
    count = int(want.offsets[-1])
    assert torch.equal(got.offsets.cpu(), want.offsets)
    assert torch.equal(got.place.cpu(), want.place)
    assert torch.equal(got.rows[:count].cpu(), want.rows[:count])
    assert torch.equal(got.row_weight[:count].cpu(), want.row_weight[:count])
    results = torch.randn(max(tokens * k, 1), 72).to(dtype)
    shared = torch.randn(tokens, 72).to(dtype)
    for add in (None, shared):
        for out in DTYPES:
            sums = permute_reference.moe_unpermute(results, want.place, add, out)
            back = permute.moe_unpermute(there(results), got.place, there(add), out)
            assert torch.equal(back.cpu(), sums)


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "first", "local"),
    [
        (1, 6, 256, 64, 64),
        (32, 6, 384, 96, 96),
        (700, 6, 256, 64, 64),
        (4, 2, 9, 20, 3),
        (0, 6, 8, 0, 8),
    ],
)
def test_permute_quant(tokens: int, k: int, experts: int, first: int, local: int) -> None:
    plain = quant_reference.quant_rows(torch.randn(tokens, 1160) * 3)
    rows = QuantRows(q=there(plain.q), scale=there(plain.scale))
    ids = torch.rand(tokens, experts).argsort(1)[:, :k].sort(1).values
    weights = torch.rand(tokens, k)
    where = {"first_expert": first, "num_local": local}
    want = permute_reference.moe_permute_quant(plain, ids, weights, **where)
    got = permute.moe_permute_quant(rows, there(ids), there(weights), **where)
    count = int(want.offsets[-1])
    assert torch.equal(got.offsets.cpu(), want.offsets)
    assert torch.equal(got.place.cpu(), want.place)
    assert got.rows.shape == want.rows.shape
    for name in ("q", "scale"):
        mine, twin = getattr(got.rows, name), getattr(want.rows, name)
        assert torch.equal(mine[:count].view(torch.uint8).cpu(), twin[:count].view(torch.uint8))
    assert torch.equal(got.row_weight[:count].cpu(), want.row_weight[:count])
