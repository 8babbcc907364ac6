"""Draws tokens from logits. A row's token depends on its logits, its parameters and its position only.

Filters and noise are computed per row, and the noise is keyed by (seed, output position): batch
neighbours, preemption and speculation change nothing. A draft for output position s that is drawn with
the noise of s agrees with the target as often as the two distributions allow (coupled sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels import gumbel_noise
from worker.protocol import SamplingParams, TokenLogprobs

_COLDEST = 1e-30  # a temperature that float32 would round to zero would divide zero by zero


class SamplingError(RuntimeError):
    """Logits that no token can be drawn from."""


@dataclass(slots=True)
class TokenHistory:
    """The tokens that penalties look at.

    Args:
        prompt: prompt tokens; the worker extends it chunk by chunk.
        output: output tokens up to, not including, the one to draw.
    """

    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    _prompt_ids: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)
    _prompt_size: int = field(default=0, init=False, repr=False, compare=False)

    def with_output(self, token_ids: Sequence[int]) -> TokenHistory:
        """A history with more output tokens (drafts before a row); this one stays as it is."""
        longer = TokenHistory(self.prompt, [*self.output, *token_ids])
        longer._prompt_ids, longer._prompt_size = self._prompt_ids, self._prompt_size
        return longer

    def prompt_ids(self) -> np.ndarray:
        """Distinct prompt tokens, int64 ascending; counted once per prompt length."""
        if self._prompt_ids is None or self._prompt_size != len(self.prompt):
            self._prompt_ids = np.unique(np.asarray(self.prompt, dtype=np.int64))
            self._prompt_size = len(self.prompt)
        return self._prompt_ids

    def output_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct output tokens, int64 ascending, and how often each occurs."""
        return np.unique(np.asarray(self.output, dtype=np.int64), return_counts=True)


class Sampler:
    """Token choice and log-probabilities; holds no state."""

    def sample(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        steps: Sequence[int],
        histories: Sequence[TokenHistory | None] | None = None,
    ) -> list[int]:
        """Draw one token per row.

        Order: repetition, then frequency and presence penalty; temperature; top-k, top-p (of what
        top-k left), min-p; Gumbel-max. Equal logits: the smaller token id wins.

        Args:
            logits: float32 [N, vocab]; not changed.
            params: of each row.
            steps: output position of each row's token (0 = the first token after the prompt).
            histories: needed where ``params[i].needs_history``.

        Returns:
            N token ids.

        Raises:
            SamplingError: a row holds NaN, +inf or nothing but -inf; names the row.
            ValueError: lists of the wrong length, or a penalty without a history.
        """
        rows = [None] * len(params) if histories is None else histories
        _check_lengths(logits, params=params, steps=steps, histories=rows)
        if not params:
            return []
        best = check_rows(logits)
        tokens: list[int] = best.tolist()
        penalised = [i for i, p in enumerate(params) if p.needs_history]
        drawn = [i for i, p in enumerate(params) if p.temperature > 0]
        if not penalised and not drawn:
            return tokens
        if penalised:
            logits = logits.clone()
            for i in penalised:
                _penalise(logits[i], params[i], rows[i], i)
        greedy = [i for i in penalised if params[i].temperature <= 0]
        for i, token in zip(greedy, logits[greedy].argmax(-1).tolist(), strict=True):
            tokens[i] = token
        if drawn:
            chosen = _draw(logits[drawn], [params[i] for i in drawn], [steps[i] for i in drawn])
            for i, token in zip(drawn, chosen, strict=True):
                tokens[i] = token
        return tokens

    def token_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], n: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities under the raw logits, before penalties and temperature.

        Args:
            logits: float32 [N, vocab].
            token_ids: the token of each row to report.
            n: how many of the best tokens to list, 0 or more; best first, ties to the smaller id.

        Returns:
            N reports; a token's rank counts the tokens that come before it in that order, from 1.

        Raises:
            SamplingError: as ``sample``.
            ValueError: lists of the wrong length, a token outside the vocabulary, or n < 0.
        """
        _check_lengths(logits, token_ids=token_ids)
        vocab = logits.shape[1]
        if n < 0:
            raise ValueError(f"token_logprobs: n = {n}, allowed: 0 or more")
        for i, token in enumerate(token_ids):
            if not 0 <= token < vocab:
                raise ValueError(f"token_logprobs: row {i}: token {token}, allowed: 0..{vocab - 1}")
        if not token_ids:
            return []
        check_rows(logits)
        ids = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
        chosen = logits.gather(1, ids)
        before = torch.arange(vocab, device=logits.device) < ids
        ahead = (logits > chosen) | ((logits == chosen) & before)
        ranks = (ahead.sum(1) + 1).tolist()
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(1, ids).squeeze(1).tolist()
        top_ids = _top_ids(logits, min(n, vocab))
        top_values = logprobs.gather(1, top_ids).tolist()
        return [
            TokenLogprobs(
                token_id=token,
                logprob=own[i],
                rank=ranks[i],
                top=list(zip(top, top_values[i], strict=True)),
            )
            for i, (token, top) in enumerate(zip(token_ids, top_ids.tolist(), strict=True))
        ]


def _check_lengths(logits: Tensor, **lists: Sequence[object]) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(
            f"sampler: logits: expected float32 [rows, vocab], got {logits.dtype}"
            f" {list(logits.shape)}"
        )
    for name, values in lists.items():
        if len(values) != logits.shape[0]:
            raise ValueError(
                f"sampler: {name}: expected {logits.shape[0]} entries as logits has rows, got"
                f" {len(values)}"
            )


def check_rows(logits: Tensor) -> Tensor:
    """Token id of each row's largest logit (the first among equals).

    The maximum is NaN or infinite exactly when a row cannot be sampled from.
    """
    peak, ids = logits.max(-1)
    bad = ~peak.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        value = float(peak[row])
        what = "all logits are -inf" if value == float("-inf") else f"the largest logit is {value}"
        raise SamplingError(f"row {row} of {logits.shape[0]} cannot be sampled from: {what}")
    return ids


def _penalise(row: Tensor, p: SamplingParams, history: TokenHistory | None, index: int) -> None:
    """Change one row of logits in place."""
    if history is None:
        raise ValueError(f"sampler: row {index}: its penalties need a token history, got none")
    output, counts = history.output_ids()
    if p.repetition_penalty != 1:
        seen = torch.from_numpy(np.union1d(history.prompt_ids(), output)).to(row.device)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
    ids = torch.from_numpy(output).to(row.device)
    times = torch.from_numpy(counts).to(row.device).float()
    row[ids] -= p.frequency_penalty * times + p.presence_penalty


def _draw(logits: Tensor, params: list[SamplingParams], steps: list[int]) -> list[int]:
    """Gumbel-max over rows that all have a temperature."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    # From the peak down, a low temperature cannot overflow and the noise keeps its precision.
    scaled = (logits - logits.amax(-1, keepdim=True)) / column(
        [max(p.temperature, _COLDEST) for p in params]
    )
    vocab = logits.shape[1]
    cut = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1.0 or p.min_p > 0.0]
    if cut:
        chosen = [params[i] for i in cut]
        scaled[cut] = _filtered(
            scaled[cut],
            column([float(p.top_k) if p.top_k > 0 else float(vocab) for p in chosen]),
            column([p.top_p if p.top_p < 1.0 else float("inf") for p in chosen]),
            column([p.min_p for p in chosen]),
        )
    seeds = torch.tensor([signed(p.seed) for p in params], dtype=torch.int64)
    noise = gumbel_noise(seeds, torch.tensor(steps, dtype=torch.int64), vocab, logits.device)
    tokens: list[int] = (scaled + noise).argmax(-1).tolist()
    return tokens


def _filtered(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits with -inf for the tokens that the filters drop; the best token always stays."""
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    position = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill(position >= top_k, float("-inf"))
    probs = values.softmax(-1)
    mass_before = probs.cumsum(-1, dtype=torch.float64) - probs
    keep = (mass_before < top_p) & (probs >= min_p * probs[:, :1])
    keep[:, 0] = True
    values = values.masked_fill(~keep, float("-inf"))
    return torch.empty_like(scaled).scatter_(1, order, values)


def signed(seed: int) -> int:
    """A seed of any size as int64: its low 64 bits."""
    low = seed & ((1 << 64) - 1)
    return low - (1 << 64) if low >= 1 << 63 else low


def _top_ids(logits: Tensor, n: int) -> Tensor:
    """Ids of the n best tokens, int64 [N, n], best first, ties to the smaller id."""
    values, ids = logits.topk(n, dim=-1)
    if n == 0:
        return ids
    # topk may take any of the tokens that tie for the last place; those rows are sorted in full.
    tied = (logits >= values[:, -1:]).sum(-1) > n
    if tied.any():
        full = logits[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = full.values[:, :n], full.indices[:, :n]
    by_id = ids.argsort(-1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    return ids.gather(1, values.argsort(dim=-1, descending=True, stable=True))
