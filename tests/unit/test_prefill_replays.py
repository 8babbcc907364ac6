"""Which steps of the real scheduler come back: from the rehearsed chunk to a queue of long prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator

import numpy as np
import pytest
import torch

from cluster.limits import SchedulerLimits
from cluster.scheduler import Scheduler
from cluster.sequence import Request, Sequence
from kernels import CacheDtype
from model.cache_spec import CacheSpec
from model.checkpoint.source import load_config
from model.parallel.config import MeshCoord, ParallelConfig
from tests.helpers.parity_runs import shape_path
from worker.kv_cache import KVCachePool
from worker.prefill_builder import PrefillBuilder
from worker.prefill_graph import CaptureChoice
from worker.protocol import SliceOutput, StepOutput, StepPlan
from worker.rehearsal import rehearse
from worker.slots import SlotTable

BLOCK, SLOTS, BLOCKS, TAILS, VOCAB = 128, 4, 256, 24, 97
MODEL_LEN = 16384
CPU = torch.device("cpu")


class Books:
    """A rank that computes nothing: what it would do with every prefill step."""

    def __init__(self, cp: int) -> None:
        parallel = ParallelConfig(cp=cp)
        spec = CacheSpec(
            config=load_config(path="", shape=shape_path()),
            dtype=CacheDtype.FP32,
            block_size=BLOCK,
            max_drafts=0,
            with_mtp=False,
            parallel=parallel,
        )
        pool = KVCachePool(
            spec, num_blocks=1, num_slots=1, num_tails=1, device=CPU, streams_dtype=torch.float32
        )
        self.slots = SlotTable(SLOTS, MODEL_LEN // BLOCK + 1, cp=cp, cp_rank=0, sharded=False)
        coord = MeshCoord(cp=cp, tp=1, rank=0)
        self.builder = PrefillBuilder(spec, parallel, coord, pool, self.slots, CPU, pad_tables=True)
        self.choice = CaptureChoice()
        self.steps: list[tuple[str, StepPlan]] = []  # action, plan

    def execute(self, plan: StepPlan) -> StepOutput:
        for init in plan.inits:
            self.slots.open(init)
        for part in plan.prefill:
            self.slots.append_blocks(part.slot, part.block_ids)
        if plan.prefill:
            key: Hashable = self.builder.build(plan.prefill).key
            self.steps.append((self.choice.choose(key).action, plan))
        outputs = [
            SliceOutput(request_id=s.request_id, token_ids=[1] if s.sample else [])
            for s in plan.prefill
        ]
        return StepOutput(step_id=plan.step_id, rank=0, outputs=outputs, seconds=0.0)


def limits(tokens: int, *, prefix_cache: bool) -> SchedulerLimits:
    return SchedulerLimits(
        num_blocks=BLOCKS,
        block_size=BLOCK,
        num_shards=1,
        num_tails=TAILS,
        num_slots=SLOTS,
        max_model_len=MODEL_LEN,
        max_batched_tokens=tokens,
        num_drafts=0,
        tail_interval=4,
        prefix_cache=prefix_cache,
        vocab_size=VOCAB,
    )


def rehearsed(cp: int, bounds: SchedulerLimits) -> Books:
    books = Books(cp)
    rehearse(
        books.execute,
        num_slots=SLOTS,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        max_model_len=MODEL_LEN,
        max_batched_tokens=bounds.max_batched_tokens,
        num_drafts=0,
        batches=[1],
        num_tails=TAILS if bounds.prefix_cache else 0,
        tail_interval=bounds.tail_interval,
        prefill_graphs=True,
    )
    books.slots.clear()
    books.steps.clear()
    return books


def serve(books: Books, bounds: SchedulerLimits, lengths: list[int]) -> None:
    """Prompts of these lengths, all queued at once, each with one token of output."""
    scheduler, draw = Scheduler(bounds), np.random.default_rng(0)
    for number, length in enumerate(lengths):
        ids = tuple(draw.integers(VOCAB, size=length).tolist())
        scheduler.add(Sequence(Request(request_id=number, prompt_ids=ids, max_tokens=1)))
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.postprocess(books.execute(plan))


def actions(books: Books, tokens: int) -> Iterator[tuple[str, int]]:
    """(action, first position) of steps that are one full chunk."""
    for action, plan in books.steps:
        (first, *others) = plan.prefill
        if not others and len(first.token_ids) == tokens:
            yield action, first.start


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("cp", [1, 4])
@pytest.mark.parametrize("tokens", [1024, 1000, 640])
def test_the_first_chunk_of_the_first_prompt_replays(
    cp: int, tokens: int, prefix_cache: bool
) -> None:
    bounds = limits(tokens, prefix_cache=prefix_cache)
    books = rehearsed(cp, bounds)
    serve(books, bounds, [3 * tokens + 100])
    assert [action for action, _ in books.steps][:2] == ["replay", "launch"]


def test_queued_long_prompts_replay_their_full_chunks() -> None:
    tokens, draw = 1024, np.random.default_rng(1)
    bounds = limits(tokens, prefix_cache=True)
    books = rehearsed(4, bounds)
    lengths = draw.integers(5 * tokens, 7 * tokens, size=12).tolist()
    serve(books, bounds, lengths)
    full = list(actions(books, tokens))
    assert len(full) == sum(length // tokens for length in lengths)
    assert all(start % tokens == 0 for _, start in full)
    counts = Counter(action for action, _ in full)
    # Launched and captured once: what is neither a first chunk (rehearsed) nor a last one.
    assert (counts["launch"], counts["capture"]) == (1, 1)
    assert all(action == "replay" for action, start in full if start == 0)
