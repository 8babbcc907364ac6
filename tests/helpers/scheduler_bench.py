"""A scheduler on mock ranks, stepped by hand."""

from __future__ import annotations

from cluster.limits import SchedulerLimits
from cluster.scheduler import Scheduler
from cluster.sequence import Request, Sequence
from tests.helpers.mock_executor import MockExecutor, reference
from worker.protocol import (
    StepPlan,
)

VOCAB = 97


class Bench:
    """A scheduler on mock ranks."""

    def __init__(self, **options: int | bool) -> None:
        self.ranks = MockExecutor(
            vocab=VOCAB,
            **{  # type: ignore[arg-type]
                key: options.pop(key)
                for key in (
                    "num_blocks",
                    "num_slots",
                    "num_tails",
                    "max_model_len",
                    "mtp",
                    "num_shards",
                )
                if key in options
            },
        )
        info = self.ranks.start(lambda line: None)
        self.limits = SchedulerLimits(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            num_shards=self.ranks.num_shards,
            num_tails=info.num_tails,
            num_slots=info.num_slots,
            max_model_len=info.max_model_len,
            num_drafts=self.ranks.mtp,
            vocab_size=int(options.pop("vocab_size", VOCAB)),
            **{"max_batched_tokens": 64, "tail_interval": 2, "prefix_cache": True, **options},  # type: ignore[arg-type]
        )
        self.scheduler = Scheduler(self.limits)
        self.ranks.ref_count = self.scheduler.placement.blocks.ref_count
        self.next_id = 0

    def add(self, prompt: list[int], max_tokens: int = 4, **options: object) -> Sequence:
        """Queue a request."""
        request = Request(
            request_id=self.next_id,
            prompt_ids=tuple(prompt),
            max_tokens=max_tokens,
            **options,  # type: ignore[arg-type]
        )
        seq = Sequence(request)
        self.scheduler.add(seq)
        self.next_id += 1
        return seq

    def step(self) -> StepPlan:
        """Plan one step and run it."""
        plan = self.scheduler.schedule()
        assert plan is not None
        self.scheduler.postprocess(self.ranks.execute(plan))
        return plan

    def run(self) -> list[StepPlan]:
        """All steps until nothing is left to do."""
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) < 2000
        return plans

    def expected(self, seq: Sequence) -> list[int]:
        """The tokens that the mock ranks give a request, whatever runs beside it."""
        request = seq.request
        return reference(
            list(request.prompt_ids),
            request.sampling,
            max_tokens=request.max_tokens,
            vocab=VOCAB,
            stop=request.stop_token_ids,
        )

    def is_clean(self) -> bool:
        """Whether every slot, block and tail is free."""
        placement = self.scheduler.placement
        return (
            placement.blocks.num_free == self.limits.num_blocks
            and placement.num_free_slots == self.limits.num_slots
            and placement.blocks.tails.num_pinned == 0
            and placement.blocks.tails.num_taken == 0
        )


def prompt(length: int, first: int = 0) -> list[int]:
    """Tokens that differ from those of another ``first``."""
    return [(first * 31 + 7 * i) % VOCAB for i in range(length)]


def chunks_of(plans: list[StepPlan]) -> list[list[tuple[int, int, int]]]:
    """(request, start, tokens) of every slice, by step."""
    return [[(s.request_id, s.start, len(s.token_ids)) for s in plan.prefill] for plan in plans]
