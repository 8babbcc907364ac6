"""Sampling on a rank group: rank 0 draws, every rank learns the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.parallel.collectives import Group
from worker.protocol import SamplingParams, TokenLogprobs
from worker.sampler import Sampler, TokenHistory


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
    """Draws for the whole world, so that all ranks go on with the same tokens."""

    def __init__(self, world: Group, device: torch.device) -> None:
        self.world, self.device = world, device
        self.sampler = Sampler()

    def draw(
        self, logits: Tensor, jobs: Sequence[DrawJob], *, with_logprobs: bool = True
    ) -> list[Draw]:
        """One token per row of logits float32 [N, V]; collective."""
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
