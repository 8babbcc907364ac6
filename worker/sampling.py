"""Sampling on a rank group: every rank learns the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import merge_samples, sample_partial
from model.parallel.collectives import Group
from model.parallel.vocab import VocabLogits
from worker.protocol import SamplingParams, TokenLogprobs
from worker.sampler import Sampler, TokenHistory, check_rows, signed


@dataclass(frozen=True, slots=True)
class DrawJob:
    """How to draw one row's token; ``step`` is its output position, 0 = right after the prompt."""

    params: SamplingParams
    step: int
    history: TokenHistory | None


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token; log-probabilities (one entry) only on rank 0 and only when asked for."""

    token: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class RankSampler:
    """Draws for the whole world, so that all ranks go on with the same tokens.

    Rows that need no look at the whole vocabulary are drawn where their columns are, and the ranks
    exchange a few numbers; for the others rank 0 draws from the gathered logits.
    """

    def __init__(self, world: Group, device: torch.device) -> None:
        self.world, self.device = world, device
        self.sampler = Sampler()

    def draw(
        self, logits: VocabLogits, jobs: Sequence[DrawJob], *, with_logprobs: bool = True
    ) -> list[Draw]:
        """One token per row of logits; collective.

        Raises:
            SamplingError: a row that no token can be drawn from, on every rank or on rank 0.
        """
        if not jobs:
            return []
        apart = logits.everyone_has_columns and all(
            _drawn_apart(job.params, with_logprobs) for job in jobs
        )
        if apart:
            return self._draw_apart(logits, jobs)
        return self._draw_together(logits.full(), jobs, with_logprobs)

    def _draw_apart(self, logits: VocabLogits, jobs: Sequence[DrawJob]) -> list[Draw]:
        params = [job.params for job in jobs]

        temperature = self._on_device([p.temperature for p in params], torch.float32)
        seeds = self._on_device([signed(p.seed) for p in params], torch.int64)
        steps = self._on_device([job.step for job in jobs], torch.int64)
        peak = None
        if self.world.size > 1 and any(p.temperature > 0 for p in params):
            peak = self.world.all_reduce(logits.local.amax(-1), "max")
        part = sample_partial(
            logits.local,
            temperature,
            seeds,
            steps,
            vocab_offset=logits.first,
            vocab_size=logits.vocab_size,
            peak=peak,
        )
        ids, lse = part.ids, part.lse
        if self.world.size > 1:
            parts = (logits.gather(part.score), logits.gather(ids), logits.gather(lse))
            ids, lse = merge_samples(*parts)
        tokens, finite = torch.stack([ids, lse.isfinite().to(ids.dtype)]).tolist()
        if not all(finite):
            check_rows(logits.full())  # names the row and what is wrong with it
        return [Draw(token) for token in tokens]

    def _on_device(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def _draw_together(
        self, logits: Tensor, jobs: Sequence[DrawJob], with_logprobs: bool
    ) -> list[Draw]:
        """Rank 0 draws from whole rows, float32 [N, V]."""
        tokens = torch.zeros(len(jobs), dtype=torch.int64, device=self.device)
        reports: list[list[TokenLogprobs]] = [[] for _ in jobs]
        if self.world.rank == 0:
            drawn = self.sampler.sample(
                logits, [j.params for j in jobs], [j.step for j in jobs], [j.history for j in jobs]
            )
            tokens = torch.tensor(drawn, dtype=torch.int64, device=self.device)
            if with_logprobs:
                for i, job in enumerate(jobs):
                    if job.params.logprobs >= 0:
                        reports[i] = self.logprobs(
                            logits[i : i + 1], [drawn[i]], job.params.logprobs
                        )
        self.world.broadcast(tokens, 0)
        return [Draw(t, r) for t, r in zip(tokens.tolist(), reports, strict=True)]

    def logprobs(self, logits: Tensor, token_ids: Sequence[int], n: int) -> list[TokenLogprobs]:
        """Log-probabilities of one token per row; local to the calling rank."""
        return self.sampler.token_logprobs(logits, token_ids, n)


def _drawn_apart(params: SamplingParams, with_logprobs: bool) -> bool:
    """Whether a token can be drawn without seeing the whole row."""
    reported = with_logprobs and params.logprobs >= 0
    return not (params.needs_history or params.filters or reported)
