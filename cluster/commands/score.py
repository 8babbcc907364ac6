"""``score``: logits of given tokens, teacher-forced; for oracles and perplexity."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cluster.commands.common import (
    add_config_arguments,
    check_output_file,
    config_from,
    read_token_file,
    say,
)
from cluster.commands.exits import EXIT_OK, InputError
from cluster.commands.serving import prepare, running_engine
from cluster.engine import LLMEngine
from cluster.errors import RequestError
from cluster.events import ScoreRequest
from cluster.params import check_token_ids

Rows = NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE.json", help='{"requests": [[ids], ...]}'
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="gets logits.I float32 [T, vocab] and, with --mtp, mtp_logits.I [T-1, vocab]",
    )
    parser.add_argument(
        "--decode-from",
        type=int,
        metavar="K",
        help="prefill rows 0..K-1, decode every later token by itself (1 <= K < T)",
    )
    parser.add_argument("--mtp", action="store_true", help="also the MTP block's logits")


def run(args: argparse.Namespace) -> int:
    """Score all requests and write one file."""
    requests = [
        ScoreRequest(token_ids=ids, decode_from=args.decode_from, mtp=args.mtp)
        for ids in read_token_file(args.input)
    ]
    for index, request in enumerate(requests):
        try:
            request.spec()
        except RequestError as err:
            raise InputError(f"{args.input}: request {index}: {err}") from err
    check_output_file("--output", args.output)
    served = prepare(config_from(args), load_mtp=args.mtp)
    vocab = served.model.vocab_size
    for index, request in enumerate(requests):
        check_token_ids(f"{args.input}: request {index}", request.token_ids, vocab)
    served.check_scores(requests)
    with running_engine(served) as engine:
        tensors = collect(engine, requests, vocab)
    _save(tensors, args.output)
    say(f"{args.output}: {len(requests)} request(s)")
    return EXIT_OK


def collect(engine: LLMEngine, requests: list[ScoreRequest], vocab: int) -> dict[str, Rows]:
    """Every request's rows: ``logits.I`` float32 [T, vocab], ``mtp_logits.I`` [T-1, vocab]."""
    tensors: dict[str, Rows] = {}
    for index, request in enumerate(requests):
        length = len(request.token_ids)
        tensors[f"logits.{index}"] = np.full((length, vocab), np.nan, dtype=np.float32)
        if request.mtp:
            tensors[f"mtp_logits.{index}"] = np.full((length - 1, vocab), np.nan, dtype=np.float32)
    for rows in engine.score(requests):
        parts = [("logits", rows.num_rows, rows.logits)]
        if rows.num_mtp_rows:
            parts.append(("mtp_logits", rows.num_mtp_rows, rows.mtp_logits))
        for name, count, data in parts:
            values = np.frombuffer(data, dtype=np.float32).reshape(count, vocab)
            tensors[f"{name}.{rows.index}"][rows.start : rows.start + count] = values
    return tensors


def _save(tensors: dict[str, Rows], path: Path) -> None:
    """Write whole or not at all."""
    partial = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        save_file(tensors, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
