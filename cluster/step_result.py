"""What a step brought one sequence, and the check that an output answers its plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import WorkerFailure
from cluster.sequence import Sequence
from worker.protocol import (
    DecodeSlice,
    PrefillSlice,
    SliceOutput,
    StepOutput,
    StepPlan,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """One sequence's share of a step."""

    seq: Sequence
    token_ids: list[int] = field(default_factory=list)  # new output tokens, cut where they end
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # not reported before
    row_start: int = 0  # scoring: position of the first row
    num_rows: int = 0
    logits: bytes = b""  # float32 [num_rows, vocab]
    mtp_logits: bytes = b""  # float32 [num_rows or num_rows - 1, vocab]


def check_output(plan: StepPlan, output: StepOutput, vocab_size: int) -> None:
    """WorkerFailure unless ``output`` has one fitting result for every slice of ``plan``."""

    def fail(detail: str) -> WorkerFailure:
        return WorkerFailure(output.rank, plan.phase, plan.step_id, detail)

    if output.step_id != plan.step_id:
        raise fail(f"answered step {output.step_id}")
    results = {item.request_id: item for item in output.outputs}
    slices: list[PrefillSlice | DecodeSlice] = [*plan.prefill, *plan.decode]
    wanted = {item.request_id for item in slices}
    if set(results) != wanted or len(output.outputs) != len(slices):
        got = sorted(item.request_id for item in output.outputs)
        raise fail(f"answered requests {got}, the plan has {sorted(wanted)}")
    for item in slices:
        detail = _mismatch(item, results[item.request_id], vocab_size)
        if detail:
            raise fail(f"request {item.request_id}: {detail}")


def _mismatch(item: PrefillSlice | DecodeSlice, result: SliceOutput, vocab_size: int) -> str:
    """What is wrong with one slice's result; empty if nothing."""
    if isinstance(item, PrefillSlice):
        rows = len(item.token_ids)
        wanted = 1 if item.sample else 0
        if result.num_accepted or len(result.token_ids) != wanted:
            return f"{len(result.token_ids)} tokens from a prefill chunk, {wanted} expected"
    else:
        rows = item.num_tokens
        wanted = 0 if item.token_ids else result.num_accepted + 1
        if not 0 <= result.num_accepted < rows or len(result.token_ids) != wanted:
            return (
                f"{len(result.token_ids)} tokens with {result.num_accepted} accepted drafts "
                f"from {rows} decode rows"
            )
    for token_id in result.token_ids:
        if not 0 <= token_id < vocab_size:
            return f"token id {token_id} is not in 0..{vocab_size - 1}"
    row_bytes = 4 * vocab_size
    mtp_rows = rows if item.next_token >= 0 else rows - 1
    for name, asked, count, data in (
        ("logits", item.logits, rows, result.logits),
        ("mtp_logits", item.mtp_logits, mtp_rows, result.mtp_logits),
    ):
        if asked and len(data) != count * row_bytes:
            return f"{len(data)} bytes of {name}, {count} rows of {row_bytes} expected"
    return ""
