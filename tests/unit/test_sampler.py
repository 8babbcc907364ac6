"""The sampler: greedy, filters and penalties against plain Python, and independence of the batch."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from worker.protocol import SamplingParams
from worker.sampler import Sampler, SamplingError, TokenHistory

SAMPLER = Sampler()
GREEDY = SamplingParams()


def many(
    logits: list[float], count: int, history: TokenHistory | None = None, **kw: float
) -> list[int]:
    """``count`` draws from one distribution, at output positions 0, 1, ..."""
    params = SamplingParams(**{"temperature": 1.0, **kw})
    rows = torch.tensor([logits]).expand(count, -1)
    return SAMPLER.sample(rows, [params] * count, list(range(count)), [history] * count)


def filtered(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Token -> probability after the filters, in the obvious way."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total = sum(weights)
    probs = [w / total for w in weights]
    kept, mass = {}, 0.0
    for i, p in zip(order, probs, strict=True):
        if kept and mass >= top_p:
            break
        mass += p
        if p >= min_p * probs[0]:
            kept[i] = p
    total = sum(kept.values())
    return {i: p / total for i, p in kept.items()}


def penalised(
    logits: list[float], p: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    out = list(logits)
    for i in set(prompt) | set(output):
        out[i] = out[i] / p.repetition_penalty if out[i] > 0 else out[i] * p.repetition_penalty
    for i, count in Counter(output).items():
        out[i] -= p.frequency_penalty * count + p.presence_penalty
    return out


def test_greedy_is_the_first_best_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-9.0, -8.0, -7.0, -1.0]])
    assert SAMPLER.sample(logits, [GREEDY] * 3, [0, 1, 2]) == [1, 0, 3]
    assert SAMPLER.sample(logits[:0], [], []) == []
    wide = torch.full((3, 10), float("nan"))
    wide[:, 3:7] = logits
    assert SAMPLER.sample(wide[:, 3:7], [GREEDY] * 3, [0, 1, 2]) == [1, 0, 3]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (float("nan"), "largest logit is nan"),
        (float("inf"), "largest logit is inf"),
        (None, "all logits are -inf"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_sampled_are_named(
    bad: float | None, text: str, temperature: float
) -> None:
    logits = torch.randn(4, 9)
    if bad is None:
        logits[2] = float("-inf")
    else:
        logits[2, 5] = bad
    params = [SamplingParams(temperature=temperature)] * 4
    with pytest.raises(SamplingError, match=rf"row 2 of 4.*{text}"):
        SAMPLER.sample(logits, params, [0] * 4)
    with pytest.raises(SamplingError, match=rf"row 2 of 4.*{text}"):
        SAMPLER.token_logprobs(logits, [0] * 4, 1)
    assert len(SAMPLER.sample(logits[:2], params[:2], [0, 0])) == 2


def test_single_minus_inf_logits_are_never_drawn() -> None:
    drawn = many([0.0, float("-inf"), 0.0, float("-inf")], 500)
    assert set(drawn) == {0, 2}
    assert set(many([0.0, float("-inf"), 0.0], 50, top_k=3, top_p=0.99)) == {0, 2}


CASES = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (2.0, 0, 1.0, 0.0),
    (1.0, 3, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.7, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 0.25),
    (1.3, 5, 0.8, 0.0),
    (1.3, 5, 0.95, 0.2),
    (1.0, 100, 1.0, 0.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), CASES)
def test_draws_follow_the_filtered_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = [0.3, 2.0, 1.5, 1.5, -1.0, 0.0, -4.0, 1.1]
    want = filtered(logits, temperature, top_k, top_p, min_p)
    count = 4000
    drawn = Counter(
        many(logits, count, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    )
    assert set(drawn) <= set(want)
    for token, p in want.items():
        assert abs(drawn[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-9


def test_ties_at_the_edge_of_top_k_keep_the_smaller_ids() -> None:
    assert set(many([1.0] * 50, 400, top_k=3)) == {0, 1, 2}
    assert set(many([0.0, *([1.0] * 9)], 400, top_k=2)) == {1, 2}


def test_tiny_temperatures_are_greedy_and_finite() -> None:
    logits = [300.0, 299.9, -300.0, 0.0]
    for temperature in (1e-3, 1e-20, 1e-38, 1e-60):
        assert set(many(logits, 20, temperature=temperature)) == {0}


def test_penalties() -> None:
    rng = random.Random(3)
    for _ in range(60):
        vocab = 12
        logits = [rng.uniform(-3, 3) for _ in range(vocab)]
        prompt = [rng.randrange(vocab) for _ in range(rng.randrange(6))]
        output = [rng.randrange(vocab) for _ in range(rng.randrange(9))]
        p = SamplingParams(
            presence_penalty=rng.choice([0.0, 0.7, -0.5]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            repetition_penalty=rng.choice([1.0, 1.6, 0.8]),
        )
        want = penalised(logits, p, prompt, output)
        rows = torch.tensor([logits])
        before = rows.clone()
        got = SAMPLER.sample(rows, [p], [len(output)], [TokenHistory(prompt, output)])
        assert got == [max(range(vocab), key=lambda i: (want[i], -i))]
        assert torch.equal(rows, before)


def test_penalties_come_before_temperature_and_filters() -> None:
    logits = [2.0, 1.9, 0.0, -1.0]
    history = TokenHistory([], [0, 0])
    drawn = many(logits, 300, history, top_k=1, presence_penalty=0.5)
    assert set(drawn) == {1}
    drawn = Counter(many(logits, 4000, history, temperature=2.0, frequency_penalty=0.5))
    p = SamplingParams(frequency_penalty=0.5)
    want = filtered(penalised(logits, p, [], [0, 0]), 2.0, 0, 1.0, 0.0)
    for token, prob in want.items():
        assert abs(drawn[token] / 4000 - prob) < 5 * math.sqrt(prob / 4000)


def test_repetition_looks_at_the_prompt_but_presence_does_not() -> None:
    logits = torch.tensor([[1.0, 0.9]])
    history = TokenHistory([0], [])
    assert SAMPLER.sample(logits, [SamplingParams(presence_penalty=1.0)], [0], [history]) == [0]
    assert SAMPLER.sample(logits, [SamplingParams(repetition_penalty=2.0)], [0], [history]) == [1]


def test_history_grows_and_branches() -> None:
    history = TokenHistory([1, 1], [])
    p = SamplingParams(repetition_penalty=100.0)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert SAMPLER.sample(logits, [p], [0], [history]) == [2]
    history.prompt.extend([2])
    assert SAMPLER.sample(logits, [p], [0], [history]) == [0]
    drafted = history.with_output([0])
    assert SAMPLER.sample(logits, [p], [0], [drafted]) == [1]
    assert history.output == []
    history.output.append(0)
    assert SAMPLER.sample(logits, [p], [0], [history]) == [1]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        top_k=rng.choice([0, 1, 7, 40]),
        min_p=rng.choice([0.0, 0.05, 0.3]),
        presence_penalty=rng.choice([0.0, 0.0, 0.6]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=rng.choice([0, 1, -5, 2**63, 2**64 - 1, rng.randrange(2**40)]),
    )


def test_a_token_never_depends_on_its_batch() -> None:
    rng = random.Random(11)
    count, vocab = 24, 500
    logits = torch.randn(count, vocab) * 3
    params = [random_params(rng) for _ in range(count)]
    steps = [rng.randrange(5000) for _ in range(count)]
    histories = [
        TokenHistory(rng.choices(range(vocab), k=30), rng.choices(range(vocab), k=20))
        for _ in range(count)
    ]
    whole = SAMPLER.sample(logits, params, steps, histories)
    alone = [
        SAMPLER.sample(logits[i : i + 1], [params[i]], [steps[i]], [histories[i]])[0]
        for i in range(count)
    ]
    assert whole == alone
    order = rng.sample(range(count), count)
    shuffled = SAMPLER.sample(
        logits[order],
        [params[i] for i in order],
        [steps[i] for i in order],
        [histories[i] for i in order],
    )
    assert shuffled == [whole[i] for i in order]


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(1, 1000)
    p = SamplingParams(temperature=1.0, seed=4)
    first = SAMPLER.sample(logits, [p], [17])
    assert SAMPLER.sample(logits, [p], [17]) == first
    by_step = {SAMPLER.sample(logits, [p], [s])[0] for s in range(30)}
    by_seed = {
        SAMPLER.sample(logits, [SamplingParams(temperature=1.0, seed=s)], [17])[0]
        for s in range(30)
    }
    assert len(by_step) > 25
    assert len(by_seed) > 25


def test_drafts_with_the_same_noise_agree_as_often_as_the_distributions() -> None:
    """Coupled sampling: equal logits always agree, close ones nearly always."""
    count = 400
    target = torch.randn(count, 64)
    params, steps = [SamplingParams(temperature=1.0, seed=9)] * count, list(range(count))
    drawn = SAMPLER.sample(target, params, steps)
    assert SAMPLER.sample(target.clone(), params, steps) == drawn
    near = SAMPLER.sample(target + 0.05 * torch.randn(count, 64), params, steps)
    assert sum(a == b for a, b in zip(drawn, near, strict=True)) > 0.9 * count
    other = SAMPLER.sample(target, params, [s + count for s in steps])
    assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 0.3 * count


def report(logits: Tensor, token: int, n: int) -> tuple[float, int, list[tuple[int, float]]]:
    row = logits.double().tolist()
    top = max(row)
    lse = top + math.log(sum(math.exp(v - top) for v in row))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return row[token] - lse, order.index(token) + 1, [(i, row[i] - lse) for i in order[:n]]


@pytest.mark.parametrize("n", [0, 1, 5, 40, 60])
def test_logprobs(n: int) -> None:
    logits = torch.randn(12, 40) * 3
    logits[3] = logits[3].round()  # many ties, also at the edge of the list
    logits[4] = 1.0
    logits[5, :30] = float("-inf")
    tokens = [random.randrange(40) for _ in range(12)]
    got = SAMPLER.token_logprobs(logits, tokens, n)
    for i, token in enumerate(tokens):
        logprob, rank, top = report(logits[i], token, n)
        assert (got[i].token_id, got[i].rank) == (token, rank)
        assert [t for t, _ in got[i].top] == [t for t, _ in top]
        torch.testing.assert_close(got[i].logprob, logprob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            [p for _, p in got[i].top], [p for _, p in top], rtol=1e-5, atol=1e-5
        )


def test_the_greedy_token_has_rank_one() -> None:
    logits = torch.randn(30, 50).round()
    tokens = SAMPLER.sample(logits, [GREEDY] * 30, [0] * 30)
    assert {r.rank for r in SAMPLER.token_logprobs(logits, tokens, 0)} == {1}


def test_wrong_arguments() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"params: expected 2 entries .* got 1"):
        SAMPLER.sample(logits, [GREEDY], [0, 0])
    with pytest.raises(ValueError, match=r"steps: expected 2 entries .* got 3"):
        SAMPLER.sample(logits, [GREEDY] * 2, [0, 0, 0])
    with pytest.raises(ValueError, match="histories: expected 2"):
        SAMPLER.sample(logits, [GREEDY] * 2, [0, 0], [None])
    with pytest.raises(ValueError, match="row 1: its penalties need a token history"):
        SAMPLER.sample(logits, [GREEDY, SamplingParams(presence_penalty=1.0)], [0, 0])
    with pytest.raises(ValueError, match="expected float32"):
        SAMPLER.sample(logits.bfloat16(), [GREEDY] * 2, [0, 0])
    with pytest.raises(ValueError, match=r"row 1: token 5, allowed: 0\.\.4"):
        SAMPLER.token_logprobs(logits, [0, 5], 1)
    with pytest.raises(ValueError, match="n = -1"):
        SAMPLER.token_logprobs(logits, [0, 1], -1)
    assert SAMPLER.token_logprobs(logits[:0], [], 3) == []
