"""``eval``: benchmarks that need no download. ``eval retrieval`` asks for facts far back in a prompt."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.commands.common import (
    add_config_arguments,
    check_output_folder,
    config_from,
    output_console,
    say,
    table,
)
from cluster.commands.exits import EXIT_FAILURE, EXIT_OK, InputError
from cluster.commands.serving import Served, prepare, running_engine
from cluster.engine import LLMEngine
from cluster.params import GenerationParams
from cluster.retrieval import (
    DEFAULT_DISTANCES,
    DEFAULT_LENGTHS,
    RetrievalBuilder,
    RetrievalPrompt,
    RetrievalScore,
    RetrievalWords,
    evaluate,
    grid,
    program_text,
    total,
)
from cluster.retrieval_plot import plot_scores
from cluster.sequence import FinishReason

_ANSWER_TOKENS = 2  # the value and the newline after it: decode (and MTP) takes part
_PARAMS = GenerationParams(max_tokens=_ANSWER_TOKENS, ignore_eos=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    retrieval = kinds.add_parser("retrieval", help="accuracy by distance, as a table and a PNG")
    add_config_arguments(retrieval)
    retrieval.add_argument(
        "--lengths", type=_numbers, default=DEFAULT_LENGTHS, metavar="N,N", help="prompt tokens"
    )
    retrieval.add_argument(
        "--distances",
        type=_numbers,
        default=DEFAULT_DISTANCES,
        metavar="N,N",
        help="tokens from the fact's value to the answer",
    )
    retrieval.add_argument("--num", type=int, default=4, metavar="N", help="prompts of each kind")
    retrieval.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="ask again: later rounds hit the cache"
    )
    retrieval.add_argument("--facts", type=int, default=48, metavar="N", help="facts in a prompt")
    retrieval.add_argument("--seed", type=int, default=0)
    retrieval.add_argument(
        "--words", type=Path, metavar="FILE", help="words.json; default: the checkpoint's own"
    )
    retrieval.add_argument("--text", type=Path, metavar="FILE", help="program text to fill with")
    retrieval.add_argument(
        "--output", type=Path, default=Path("out"), metavar="DIR", help="for PNG and JSON (out)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a request ended in an error."""
    for name in ("num", "facts", "repeat"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    served = prepare(config_from(args))
    _check_lengths(args.lengths, served)
    prompts = list(grid(_builder(args, served), args.lengths, args.distances, args.num))
    if not prompts:
        raise InputError(f"no distance of {args.distances} fits a length of {args.lengths}")
    served.check_prompts([p.token_ids for p in prompts], _PARAMS)
    check_output_folder("--output", args.output)
    say(f"{len(prompts)} prompts, {sum(p.length for p in prompts)} tokens")
    with running_engine(served) as engine:
        began = time.monotonic()
        asked = _Asker(engine)
        rounds = [evaluate(prompts, asked) for _ in range(args.repeat)]
        say(f"{time.monotonic() - began:.1f} s")
        if engine.stats.prefix_hits:
            say(f"{engine.stats.prefix_hits} prompt tokens came from the prefix cache")
        if engine.stats.drafts_proposed:
            say(f"MTP acceptance {engine.stats.acceptance:.3f}")
    scores = total(rounds)
    _print(scores)
    _save(scores, args.output, served)
    return EXIT_FAILURE if asked.failed else EXIT_OK


class _Asker:
    """Asks the engine for the next token of each prompt; -1 where a request failed."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self.failed = False

    def __call__(self, prompts: Sequence[RetrievalPrompt]) -> list[int]:
        answers = [-1] * len(prompts)
        for event in self._engine.generate([list(p.token_ids) for p in prompts], _PARAMS):
            if event.token_ids and answers[event.index] < 0:
                answers[event.index] = event.token_ids[0]
            if event.finish_reason is FinishReason.ERROR:
                self.failed = True
                say(f"error: prompt {event.index}: {event.error}")
        return answers


def _check_lengths(lengths: Sequence[int], served: Served) -> None:
    """InputError for a length no request can have, before its prompts are made."""
    most = served.limits.max_request_tokens - _ANSWER_TOKENS
    if max(lengths) > most:
        raise InputError(
            f"--lengths {max(lengths)}: at most {most} tokens (model.max_model_len, KV cache)"
        )


def _builder(args: argparse.Namespace, served: Served) -> RetrievalBuilder:
    if served.tokenizer is None:
        raise InputError("eval retrieval needs a checkpoint with tokenizer.json (model.path)")
    words = args.words or Path(served.config.model.path) / "words.json"
    try:
        text = program_text() if args.text is None else args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"--text {args.text}: cannot be read: {err}") from err
    return RetrievalBuilder(
        words=RetrievalWords.from_file(words, bos_id=served.model.bos_token_id),
        filler=served.tokenizer.encode(text),
        num_facts=args.facts,
        seed=args.seed,
    )


def _print(scores: Sequence[RetrievalScore]) -> None:
    rows: list[tuple[object, ...]] = [
        (s.length, s.distance, f"{s.correct}/{s.total}", f"{s.accuracy:.0%}") for s in scores
    ]
    right, total = sum(s.correct for s in scores), sum(s.total for s in scores)
    rows.append(("all", "", f"{right}/{total}", f"{right / total:.0%}"))
    columns = ("prompt tokens", "distance", "right", "accuracy")
    output_console().print(table("retrieval", columns, rows))


def _save(scores: Sequence[RetrievalScore], folder: Path, served: Served) -> None:
    config = served.config
    title = f"retrieval, cp {config.parallel.cp} x tp {config.parallel.tp}, {config.model.numerics}"
    plot_scores(scores, folder / "retrieval.png", title=title)
    record = {"title": title, "scores": [asdict(s) | {"accuracy": s.accuracy} for s in scores]}
    (folder / "retrieval.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{folder / 'retrieval.png'}\n{folder / 'retrieval.json'}")


def _numbers(text: str) -> tuple[int, ...]:
    """``20,60`` as numbers; argparse turns the error into a usage message."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, as 20,60")
    return numbers
