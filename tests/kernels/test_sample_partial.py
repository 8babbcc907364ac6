"""Sampling from a split vocabulary: the token of the whole row, from the product's own sampler."""

from __future__ import annotations

import pytest
import torch

from kernels import KernelContractError, gumbel_noise, merge_samples, sample_partial
from tests.helpers.strided import column_slice, microseconds
from worker.protocol import SamplingParams
from worker.sampler import Sampler

VOCAB = 1000
CPU = torch.device("cpu")


def inputs(rows: int, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(rows, VOCAB) * scale
    temperature = torch.tensor([0.0, 1.0, 0.3, 1e-40, 5.0]).repeat(rows)[:rows]
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,))
    return logits, temperature, seeds, torch.arange(rows) * 3


def split(
    args: tuple[torch.Tensor, ...], ranks: int, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample on ``ranks`` ranks, the last with padded columns, and merge."""
    logits, *rest = args
    peak = logits.amax(-1)
    step = -(-VOCAB // ranks)
    parts = []
    for r in range(ranks):
        columns = logits[:, r * step : (r + 1) * step]
        if r == ranks - 1 and padding:
            columns = torch.cat([columns, torch.full((len(logits), padding), 1e9)], 1)
        parts.append(
            sample_partial(
                column_slice(columns), *rest, vocab_offset=r * step, vocab_size=VOCAB, peak=peak
            )
        )
    return merge_samples(
        torch.stack([p.score for p in parts]),
        torch.stack([p.ids for p in parts]),
        torch.stack([p.lse for p in parts]),
    )


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_samplers_tokens(ranks: int) -> None:
    args = inputs(40)
    logits, temperature, seeds, steps = args
    params = [
        SamplingParams(temperature=t, seed=s)
        for t, s in zip(temperature.tolist(), seeds.tolist(), strict=True)
    ]
    want = Sampler().sample(logits, params, steps.tolist())
    ids, lse = split(args, ranks, padding=7)
    assert ids.tolist() == want
    assert torch.allclose(lse, logits.logsumexp(-1), rtol=0, atol=1e-5)


def test_one_rank_needs_no_peak_and_scores_are_the_formula() -> None:
    logits, temperature, seeds, steps = args = inputs(6)
    part = sample_partial(*args, vocab_offset=0, vocab_size=VOCAB)
    noise = gumbel_noise(seeds, steps, VOCAB, CPU)
    for i, t in enumerate(temperature.tolist()):
        row = logits[i]
        if t > 0:
            row = (row - row.max()) / max(t, 1e-30) + noise[i]
        assert int(part.ids[i]) == int(row.argmax())
        assert float(part.score[i]) == float(row.max())


def test_ties_go_to_the_smaller_id() -> None:
    logits = torch.zeros(1, VOCAB)
    zero = torch.zeros(1, dtype=torch.int64)
    for ranks in (1, 4):
        logits[:, 300:] = 1.0
        ids, _ = split((logits, torch.zeros(1), zero, zero), ranks)
        assert ids.tolist() == [300]


def test_rows_that_cannot_be_sampled_from() -> None:
    logits, temperature, seeds, steps = inputs(5)
    logits[0, 3] = float("nan")
    logits[1, 999] = float("inf")
    logits[2] = float("-inf")
    logits[3, :500] = float("-inf")  # a rank without a token; the row is fine
    ids, lse = split((logits, temperature, seeds, steps), 4)
    assert lse.isfinite().tolist() == [False, False, False, True, True]
    assert int(ids[3]) >= 500


def test_no_rows() -> None:
    part = sample_partial(
        *(a[:0] for a in inputs(2)), vocab_offset=0, vocab_size=VOCAB, peak=torch.zeros(0)
    )
    assert (part.score.shape, part.ids.shape, part.lse.shape) == ((0,), (0,), (0,))


def test_contract() -> None:
    args = inputs(2)
    with pytest.raises(KernelContractError, match="temperature: expected shape"):
        sample_partial(args[0], args[1][:1], *args[2:], vocab_offset=0, vocab_size=VOCAB)
    with pytest.raises(KernelContractError, match="logits: expected float32, got float64"):
        sample_partial(args[0].double(), *args[1:], vocab_offset=0, vocab_size=VOCAB)
    with pytest.raises(KernelContractError, match="none below vocab_size 1000"):
        sample_partial(*args, vocab_offset=VOCAB, vocab_size=VOCAB)
    with pytest.raises(KernelContractError, match="ids: expected shape"):
        merge_samples(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3))


@pytest.mark.benchmark
def test_speed() -> None:
    args = inputs(4)
    run = microseconds(lambda: sample_partial(*args, vocab_offset=0, vocab_size=VOCAB))
    print(f"sample_partial 4 x {VOCAB}: {run:.0f} us")
