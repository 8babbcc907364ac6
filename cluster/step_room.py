"""What a prefill step being planned still has room for."""

from __future__ import annotations

from cluster.limits import SchedulerLimits
from cluster.sequence import Sequence


class StepRoom:
    """Tokens and logit rows left in a step.

    Attributes:
        is_empty: nothing has joined the step yet.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._tokens, self._rows = limits.max_batched_tokens, limits.max_logit_rows
        self.is_empty = True

    def chunk(self, seq: Sequence) -> int:
        """Tokens of a sequence's next chunk; 0 if there is no room for any."""
        return min(seq.prefill_target - seq.num_computed, self._most(seq))

    def takes_whole(self, seq: Sequence, num_cached: int) -> bool:
        """Whether all of a sequence fits, of which so many tokens are cached."""
        return seq.prefill_target - num_cached <= self._most(seq)

    def take(self, seq: Sequence, size: int) -> None:
        """A chunk of ``size`` tokens joins the step."""
        self._tokens -= size
        self._rows -= size * seq.logit_rows
        self.is_empty = False

    def _most(self, seq: Sequence) -> int:
        if seq.request.score is None:
            return self._tokens
        return min(self._tokens, self._rows // seq.logit_rows)
