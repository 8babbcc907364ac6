"""Turns what a user sent into a checked ``Request``, or refuses it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from cluster.errors import RequestError
from cluster.events import ScoreRequest
from cluster.limits import SchedulerLimits
from cluster.params import GenerationParams, check_params, check_text, check_token_ids
from cluster.sequence import Request
from cluster.tokenizer import Tokenizer

Prompt = str | SequenceOf[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """The checks of one engine. Every refusal is a ``RequestError``."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    seed: int  # of the seeds for requests that bring none
    tokenizer: Tokenizer | None

    def generation(
        self, request_id: int, prompt: Prompt, params: GenerationParams, limits: SchedulerLimits
    ) -> Request:
        """A request that continues ``prompt``."""
        digest = hashlib.sha256(f"{self.seed}/{request_id}".encode()).digest()
        sampling = check_params(
            params,
            vocab_size=self.vocab_size,
            default_seed=int.from_bytes(digest[:8], "little") >> 1,
        )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the checkpoint has none")
        prompt_ids = self._prompt_ids(prompt, limits)
        room = limits.max_request_tokens - len(prompt_ids)
        if params.max_tokens is None and params.min_tokens > room:
            raise RequestError(f"min_tokens is {params.min_tokens}, but only {room} tokens fit")
        return Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            eos_token_ids=self.eos_token_ids,
            stop_token_ids=frozenset(params.stop_token_ids),
            salt=params.cache_salt,
        )

    def scoring(self, request_id: int, item: ScoreRequest, limits: SchedulerLimits) -> Request:
        """A request for the logits of given tokens."""
        _check_length("the score request", len(item.token_ids), limits, limits.max_request_tokens)
        token_ids = check_token_ids("token_ids", item.token_ids, self.vocab_size)
        return Request(request_id=request_id, prompt_ids=token_ids, score=item.spec())

    def _prompt_ids(self, prompt: Prompt, limits: SchedulerLimits) -> tuple[int, ...]:
        most = limits.max_request_tokens - 1  # one is generated at least
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("a text prompt needs a tokenizer, and the checkpoint has none")
            size = len(check_text("prompt", prompt).encode("utf-8"))
            if size > most * self.tokenizer.max_token_bytes:  # before it costs time to encode
                raise RequestError(f"the prompt has {size} bytes: more than {most} tokens")
            prompt = self.tokenizer.encode(prompt, bos=True) if prompt else []
        _check_length("the prompt", len(prompt), limits, most)
        return check_token_ids("prompt", prompt, self.vocab_size)


def _check_length(name: str, length: int, limits: SchedulerLimits, most: int) -> None:
    if not length:
        raise RequestError(f"{name} is empty")
    if length > most:
        raise RequestError(
            f"{name} has {length} tokens, at most {most} are allowed (max_model_len "
            f"{limits.max_model_len}, {limits.num_blocks} KV blocks of {limits.block_size} tokens)"
        )
