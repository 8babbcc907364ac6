"""A planned prefill step: the batch, and what the runner needs around it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.forward_batch import PrefillBatch, WindowPlan
from model.parallel.ranges import Chunk, Segment
from worker.prefill_key import StepKey


@dataclass(frozen=True, slots=True, kw_only=True)
class MTPFill:
    """Local rows whose MTP window latent is kept, and how they travel.

    Attributes:
        next_ids: int64 [T], the token after each local row of the step (0 where unknown).
        local: int64 [N], which local rows.
        positions: int64 [N], their positions in their requests.
        plan: how their latents travel and where they are kept.
    """

    next_ids: Tensor
    local: Tensor
    positions: Tensor
    plan: WindowPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStep:
    """A batch and what the runner needs around it.

    Attributes:
        packed: the buffer on the device in which the batch's tensors lie.
        chunks: the positions computed, by request.
        segments: how they are cut, by cp rank.
        fill: None without MTP.
        key: the same on every rank; steps of one key have batches of one layout.
    """

    batch: PrefillBatch
    packed: Tensor
    chunks: tuple[Chunk, ...]
    segments: tuple[tuple[Segment, ...], ...]
    fill: MTPFill | None
    key: StepKey
