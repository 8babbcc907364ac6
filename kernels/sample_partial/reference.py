"""Torch twins of ``sample_partial`` and ``merge_samples``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gumbel.reference import gumbel_columns
from kernels.sample_partial.api import PartialSample

_COLDEST = 1e-30  # a temperature that float32 would round to zero would divide zero by zero


def sample_partial(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    vocab_offset: int,
    vocab_size: int,
    peak: Tensor | None = None,
) -> PartialSample:
    """See ``kernels.sample_partial.api.sample_partial``."""
    logits = logits[:, : vocab_size - vocab_offset]
    top = logits.amax(-1) if peak is None else peak
    warmth = temperature.clamp(min=_COLDEST)[:, None]
    noise = gumbel_columns(seeds, steps, vocab_offset, logits.shape[1])
    drawn = (logits - top[:, None]) / warmth + noise
    score = torch.where(temperature[:, None] > 0, drawn, logits)
    best, column = score.max(-1)
    lse = (logits - top[:, None]).exp().sum(-1).log() + top
    return PartialSample(score=best, ids=column + vocab_offset, lse=lse)


def merge_samples(score: Tensor, ids: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.sample_partial.api.merge_samples``."""
    rank = score.argmax(0, keepdim=True)
    top = lse.amax(0)
    level = top.where(top.isfinite(), 0.0)
    # Rank by rank: torch's own sum takes an order that depends on the number of rows.
    total = torch.zeros_like(level)
    for part in lse:
        total = total + (part - level).exp()
    return ids.gather(0, rank)[0], total.log() + level
