"""Counters of one engine since its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.protocol import StepOutput, StepPlan


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """All counts only grow; seconds are of steps as the engine saw them (messages included)."""

    num_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0  # output tokens of decode steps
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of them, found
    num_preemptions: int = 0
    num_rebuilds: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish reason

    def add_step(self, plan: StepPlan, output: StepOutput, seconds: float) -> None:
        """Count a step that succeeded."""
        self.num_steps += 1
        if plan.phase == "prefill":
            self.prefill_seconds += seconds
            self.prefill_tokens += sum(len(item.token_ids) for item in plan.prefill)
        else:
            self.decode_seconds += seconds
            self.decode_tokens += sum(len(item.token_ids) for item in output.outputs)
            self.drafts_proposed += sum(item.num_drafts for item in output.outputs)
            self.drafts_accepted += sum(item.num_accepted for item in output.outputs)

    @property
    def acceptance(self) -> float:
        """Accepted share of the MTP drafts; 0.0 without any."""
        return self.drafts_accepted / self.drafts_proposed if self.drafts_proposed else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Output tokens per second of decode steps, all requests together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed prompt tokens per second of prefill steps."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
