"""What a user may ask of a request, checked before anything is built from it.

A bad value is a ``RequestError`` that names the parameter, the value and what is allowed; nothing that
passes here can make a step fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import RequestError
from worker.protocol import SamplingParams

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_SALT_BYTES = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """How a request's output is drawn and where it ends."""

    max_tokens: int | None = None  # None: as many as fit
    min_tokens: int = 0
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: the engine draws one
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # n: the chosen token's and the n best
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True  # control tokens give no text
    cache_salt: bytes = b""  # cached prefixes are shared only between requests of one salt


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """``value`` as a finite float in [low, high] (or (low, high])."""
    bad = isinstance(value, bool) or not isinstance(value, (int, float))
    if not bad and isinstance(value, int):
        bad = abs(value) > 2**53  # a float of it would overflow or lose digits
    if not bad:
        number = float(value)  # type: ignore[arg-type]
        if math.isfinite(number) and low <= number <= high and not (open_low and number == low):
            return number
    left = "(" if open_low else "["
    right = "infinity)" if high == math.inf else f"{high:g}]"
    raise RequestError(
        f"{name} must be a finite number in {left}{low:g}, {right}, got {_show(value)}"
    )


def check_int(name: str, value: object, low: int, high: int) -> int:
    """``value`` as an int in low..high; RequestError otherwise (bools are no ints here)."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer in {low}..{high}, got {_show(value)}")
    return value


def check_token_ids(name: str, values: Iterable[object], vocab_size: int) -> tuple[int, ...]:
    """``values`` as token ids of the vocabulary."""
    ids = []
    for index, value in enumerate(values):
        ids.append(check_int(f"{name}[{index}]", value, 0, vocab_size - 1))
    return tuple(ids)


def check_text(name: str, value: object) -> str:
    """``value`` as text that has a UTF-8 form (no lone surrogates)."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has a lone surrogate (U+{ord(value[error.start]):04X}) at character {error.start}"
        ) from error
    return value


def check_params(params: GenerationParams, *, vocab_size: int, default_seed: int) -> SamplingParams:
    """Check every field but ``max_tokens``' upper end; the part of them that the ranks need."""
    if params.max_tokens is not None:
        check_int("max_tokens", params.max_tokens, 1, 2**31 - 1)
    most = params.max_tokens if params.max_tokens is not None else 2**31 - 1
    check_int("min_tokens", params.min_tokens, 0, most)
    if len(params.stop) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop has {len(params.stop)} strings, at most {MAX_STOP_STRINGS} are allowed"
        )
    for index, text in enumerate(params.stop):
        if not 1 <= len(check_text(f"stop[{index}]", text)) <= MAX_STOP_CHARS:
            raise RequestError(
                f"stop[{index}] has {len(text)} characters, 1..{MAX_STOP_CHARS} are allowed"
            )
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(params.stop_token_ids)} ids, "
            f"at most {MAX_STOP_TOKEN_IDS} are allowed"
        )
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if len(params.cache_salt) > MAX_SALT_BYTES:
        raise RequestError(
            f"cache_salt has {len(params.cache_salt)} bytes, at most {MAX_SALT_BYTES} are allowed"
        )
    seed = default_seed if params.seed is None else check_int("seed", params.seed, 0, MAX_SEED)
    return SamplingParams(
        temperature=_number("temperature", params.temperature, 0.0, math.inf),
        top_p=_number("top_p", params.top_p, 0.0, 1.0, open_low=True),
        top_k=check_int("top_k", params.top_k, 0, 2**31 - 1),
        min_p=_number("min_p", params.min_p, 0.0, 1.0),
        presence_penalty=_number("presence_penalty", params.presence_penalty, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        repetition_penalty=_number(
            "repetition_penalty", params.repetition_penalty, 0.0, math.inf, open_low=True
        ),
        seed=seed,
        logprobs=_logprobs("logprobs", params.logprobs),
        prompt_logprobs=_logprobs("prompt_logprobs", params.prompt_logprobs),
    )


def _logprobs(name: str, value: int | None) -> int:
    return -1 if value is None else check_int(name, value, 0, MAX_LOGPROBS)


def _show(value: object) -> str:
    """A short form of a value somebody sent."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."
