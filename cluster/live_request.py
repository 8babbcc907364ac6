"""The output side of a request that is being served: its text, and the events about it."""

from __future__ import annotations

from cluster.detokenizer import Detokenizer
from cluster.events import RequestEvent, ScoreRows
from cluster.sequence import FinishReason, Sequence
from cluster.step_result import SequenceUpdate


class LiveRequest:
    """Turns the updates of one sequence into events; finds stop strings on the way."""

    def __init__(self, seq: Sequence, detokenizer: Detokenizer | None, index: int) -> None:
        self.seq = seq
        self._detokenizer = detokenizer
        self._index = index

    def event(self) -> RequestEvent:
        """An event with the request's present counts, and its end if it has come."""
        seq = self.seq
        return RequestEvent(
            request_id=seq.request_id,
            index=self._index,
            finish_reason=seq.finish_reason if seq.is_finished else None,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_output_tokens=seq.num_output_tokens,
            cached_tokens=max(0, seq.cached_tokens),
            timings=seq.timings if seq.is_finished else None,
        )

    def decode(self, token_ids: list[int]) -> tuple[str, int, bool]:
        """Text of the newest tokens of the sequence, how many of them belong to the output, and
        whether a stop string ended it there."""
        seq, detokenizer = self.seq, self._detokenizer
        if detokenizer is None:
            return "", len(token_ids), False
        request = seq.request
        before = seq.num_output_tokens - len(token_ids)
        by_token = seq.is_finished and seq.finish_reason is FinishReason.STOP
        text = ""
        check = True
        for count, token_id in enumerate(token_ids, start=1):
            check = before + count >= request.min_tokens
            if by_token and count == len(token_ids):
                break  # the stop token itself is not shown
            piece, stopped = detokenizer.feed(token_id, check_stop=check)
            text += piece
            if stopped:
                return text, count, True
        if not seq.is_finished:
            return text, len(token_ids), False
        piece, stopped = detokenizer.finish(check_stop=check)
        return text + piece, len(token_ids), stopped

    def score_rows(self, update: SequenceUpdate, vocab_size: int) -> ScoreRows:
        """The rows a step brought."""
        return ScoreRows(
            index=self._index,
            start=update.row_start,
            num_rows=update.num_rows,
            logits=update.logits,
            num_mtp_rows=len(update.mtp_logits) // (4 * vocab_size),
            mtp_logits=update.mtp_logits,
            finished=self.seq.is_finished,
        )
