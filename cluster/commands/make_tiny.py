"""``make-tiny``: a tiny random checkpoint in the official format, with a byte-level tokenizer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cluster.commands.common import human_bytes
from cluster.commands.exits import EXIT_OK, InputError
from model.checkpoint.tiny import make_tiny


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--shape", type=Path, metavar="FILE", help="a config.json; default: tiny")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and name the files written."""
    if not 0 <= args.seed < 1 << 63:
        raise InputError(f"--seed {args.seed}: allowed are 0 .. 2^63 - 1")
    for path in make_tiny(args.output, args.seed, _shape(args.shape)):
        print(f"{path} ({human_bytes(path.stat().st_size)})")
    return EXIT_OK


def _shape(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise InputError(f"{path}: not JSON: {err}") from err
    if not isinstance(shape, dict):
        raise InputError(f"{path}: expected a config.json object, got {type(shape).__name__}")
    return shape
