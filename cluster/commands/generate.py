"""``generate``: prompts or token ids in, text on stdout as it comes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.commands.common import add_config_arguments, config_from, read_token_file, say
from cluster.commands.exits import EXIT_FAILURE, EXIT_OK, InputError
from cluster.commands.serving import Served, prepare, running_engine
from cluster.engine import LLMEngine
from cluster.events import RequestEvent
from cluster.params import GenerationParams, check_token_ids
from cluster.sequence import FinishReason, Timings
from cluster.tokenizer import Message

_DEFAULT_MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to go on with (or --chat)")
    source.add_argument(
        "--token-ids", type=Path, metavar="FILE.json", help='[ids] or {"requests": [[ids], ...]}'
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--max-tokens", type=int, default=_DEFAULT_MAX_TOKENS, metavar="N")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    parser.add_argument("--json", action="store_true", help="one JSON line per request")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0, help="0 (default): off")
    sampling.add_argument("--min-p", type=float, default=0.0)
    sampling.add_argument("--presence-penalty", type=float, default=0.0)
    sampling.add_argument("--frequency-penalty", type=float, default=0.0)
    sampling.add_argument("--repetition-penalty", type=float, default=1.0)
    sampling.add_argument("--seed", type=int, help="of the random numbers of every request")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT")


def run(args: argparse.Namespace) -> int:
    """Serve the prompts; 1 if a request ended in an error."""
    requests = read_token_file(args.token_ids) if args.token_ids is not None else None
    if args.chat and args.prompt is None:
        raise InputError("--chat needs --prompt: token ids are taken as they are")
    served = prepare(config_from(args))
    prompts = _prompts(args, served, requests)
    params = _params(args)
    served.check_prompts(prompts, params)
    began = time.monotonic()
    with running_engine(served) as engine:
        started = time.monotonic()
        say(f"ready after {started - began:.1f} s")
        writer = _Writer(len(prompts), as_json=args.json, has_text=served.tokenizer is not None)
        failed = writer.write(engine.generate(prompts, params))
        _summarise(engine, writer, time.monotonic() - started)
    return EXIT_FAILURE if failed else EXIT_OK


def _params(args: argparse.Namespace) -> GenerationParams:
    return GenerationParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )


def _prompts(
    args: argparse.Namespace, served: Served, requests: list[list[int]] | None
) -> list[list[int]]:
    """The requests as token ids, all of the vocabulary."""
    if requests is not None:
        for index, ids in enumerate(requests):
            check_token_ids(f"{args.token_ids}: request {index}", ids, served.model.vocab_size)
        return requests
    if served.tokenizer is None:
        where = served.config.model.path or "random weights"
        raise InputError(f"--prompt needs a tokenizer.json, {where} has none; use --token-ids")
    if args.chat:
        return [served.tokenizer.encode_chat([Message(role="user", content=args.prompt)])]
    return [served.tokenizer.encode(args.prompt, bos=True)]


@dataclass(slots=True)
class _Answer:
    """What one request has said so far."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    last: RequestEvent | None = None


class _Writer:
    """Writes events to stdout: one request as a stream, several (and JSON) whole and in order."""

    def __init__(self, num_requests: int, *, as_json: bool, has_text: bool) -> None:
        self.answers = [_Answer() for _ in range(num_requests)]
        self._as_json, self._has_text = as_json, has_text
        self._streaming = num_requests == 1 and not as_json
        self._next = 0  # the first request that is not written yet

    def write(self, events: Iterable[RequestEvent]) -> bool:
        """Write all of them; whether any request ended in an error."""
        failed = False
        for event in events:
            answer = self.answers[event.index]
            answer.token_ids += event.token_ids
            answer.text += event.text
            if self._streaming:
                shown = event.text if self._has_text else "".join(f"{i} " for i in event.token_ids)
                sys.stdout.write(shown)
                sys.stdout.flush()
            if event.finished:
                answer.last = event
                if event.finish_reason is FinishReason.ERROR:
                    failed = True
                    say(f"error: request {event.index}: {event.error}")
                self._write_finished()
        return failed

    def _write_finished(self) -> None:
        while self._next < len(self.answers):
            answer = self.answers[self._next]
            if answer.last is None:
                return
            if self._as_json:
                print(json.dumps(self._record(self._next, answer, answer.last), ensure_ascii=False))
            elif self._streaming:
                print()
            else:
                shown = answer.text if self._has_text else " ".join(map(str, answer.token_ids))
                print(f"[{self._next}] {shown}")
            sys.stdout.flush()
            self._next += 1

    def _record(self, index: int, answer: _Answer, last: RequestEvent) -> dict[str, Any]:
        record: dict[str, Any] = {
            "index": index,
            "token_ids": answer.token_ids,
            "text": answer.text if self._has_text else None,
            "finish_reason": last.finish_reason.value if last.finish_reason else None,
            "prompt_tokens": last.num_prompt_tokens,
            "cached_tokens": last.cached_tokens,
            "timings": _timings(last.timings, len(answer.token_ids)),
        }
        if last.error:
            record["error"] = last.error
        return record


def _timings(timings: Timings | None, num_tokens: int) -> dict[str, float]:
    """Seconds of one request; tokens_per_s counts the tokens after the first."""
    if timings is None:
        return {}
    after_first = timings.e2e_s - timings.ttft_s
    rate = (num_tokens - 1) / after_first if num_tokens > 1 and after_first > 0 else 0.0
    return {
        "queue_s": round(timings.queue_s, 6),
        "ttft_s": round(timings.ttft_s, 6),
        "e2e_s": round(timings.e2e_s, 6),
        "tokens_per_s": round(rate, 3),
    }


def _summarise(engine: LLMEngine, writer: _Writer, seconds: float) -> None:
    stats = engine.stats
    total = sum(len(answer.token_ids) for answer in writer.answers)
    timings = [a.last.timings for a in writer.answers if a.last is not None and a.last.timings]
    first = min((t.ttft_s for t in timings if t.first_token), default=0.0)
    say(
        f"{total} tokens in {seconds:.2f} s; first token after {first:.2f} s;"
        f" prefill {stats.prefill_tokens_per_s:.1f} tokens/s,"
        f" decode {stats.decode_tokens_per_s:.1f} tokens/s"
    )
    if stats.drafts_proposed:
        say(
            f"MTP acceptance {stats.acceptance:.3f}"
            f" ({stats.drafts_accepted} of {stats.drafts_proposed} drafts)"
        )
