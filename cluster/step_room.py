"""What a prefill step being planned still has room for."""

from __future__ import annotations

from cluster.limits import SchedulerLimits
from cluster.sequence import Sequence


class StepRoom:
    """Tokens and logit rows left in a step; empty when it is made."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._tokens, self._rows = limits.max_batched_tokens, limits.max_logit_rows
        self._empty = True

    def chunk(self, seq: Sequence) -> int:
        """Tokens of a sequence's next chunk; 0 if there is no room for any."""
        return min(seq.prefill_target - seq.num_computed, self._most(seq))

    def starts(self, seq: Sequence, num_cached: int) -> bool:
        """Whether a sequence, of which so many tokens are cached, should start in this step.

        The first of a step does; behind others only what need not be split. All chunks of a long
        prompt but the last are full ones then, whose shapes come back (``worker.prefill_graph``).
        """
        return self._empty or seq.prefill_target - num_cached <= self._most(seq)

    def take(self, seq: Sequence, size: int) -> None:
        """A chunk of ``size`` tokens joins the step."""
        self._tokens -= size
        self._rows -= size * seq.logit_rows
        self._empty = False

    def _most(self, seq: Sequence) -> int:
        if seq.request.score is None:
            return self._tokens
        return min(self._tokens, self._rows // seq.logit_rows)
