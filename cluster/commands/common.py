"""What several verbs share: the config arguments, token files, tables."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.commands.exits import InputError
from cluster.config import ClusterConfig, load_config

_TABLE_WIDTH = 110  # columns of a table that does not go to a terminal
_MAX_TOKEN_FILE_BYTES = 1 << 28


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE`` and repeated ``--set KEY=VALUE``."""
    parser.add_argument("--config", type=Path, metavar="X.yaml", help="configuration file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, VALUE parsed as YAML; may be repeated",
    )


def config_from(args: argparse.Namespace, extra: Sequence[str] = ()) -> ClusterConfig:
    """The merged configuration; ``extra`` overrides come before the user's.

    Raises:
        ConfigError: see ``load_config``.
    """
    return load_config(args.config, [*extra, *args.overrides])


def say(line: str) -> None:
    """One line of news, on stderr."""
    print(line, file=sys.stderr, flush=True)


def read_token_file(path: Path) -> list[list[int]]:
    """Requests of a token file: ``[ids]``, or ``{"requests": [[ids], ...]}``.

    Raises:
        InputError: unreadable file, another structure, an empty request, or something that is not a
            token id. Whether an id is in the vocabulary is the engine's question.
    """
    raw = _read_json(path)
    if isinstance(raw, dict):
        unknown = sorted(set(raw) - {"requests"})
        if unknown or "requests" not in raw:
            raise InputError(f'{path}: expected {{"requests": [[ids], ...]}}, got keys {list(raw)}')
        requests = raw["requests"]
    else:
        # [ids], and also [[ids], ...]
        nested = isinstance(raw, list) and bool(raw) and isinstance(raw[0], list)
        requests = raw if nested else [raw]
    if not isinstance(requests, list) or not requests:
        raise InputError(f"{path}: no requests in it")
    for index, ids in enumerate(requests):
        if not isinstance(ids, list) or not ids:
            raise InputError(f"{path}: request {index} must be a non-empty list of token ids")
        for position, token_id in enumerate(ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise InputError(
                    f"{path}: request {index}, position {position}: {token_id!r} is not a token id"
                )
    return requests


def check_output_file(name: str, path: Path) -> None:
    """Find out now, not after the work, whether a file can be written; leaves nothing there.

    Raises:
        InputError: a folder, device or pipe, or a place where no file can be made.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{name} {path}: must be a file in an existing directory")
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent):
            pass
    except OSError as err:
        raise InputError(
            f"{name} {path}: must be a file in an existing directory: {err.strerror}"
        ) from err


def check_output_folder(name: str, folder: Path) -> None:
    """Make a folder if it is not there, and find out whether files can be written in it.

    Raises:
        InputError: it cannot be made, or nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise InputError(
            f"{name} {folder}: must be a folder that can be written: {err.strerror}"
        ) from err


def _read_json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > _MAX_TOKEN_FILE_BYTES:
            raise InputError(f"{path}: {size} bytes, allowed: {_MAX_TOKEN_FILE_BYTES}")
        return json.loads(path.read_bytes())
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: not JSON: {err}") from err


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; the first column left, the others right-aligned where all cells are numbers."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    cells = [[str(cell) for cell in row] for row in rows]
    for index, name in enumerate(columns):
        numeric = all(row[index][:1].isdigit() for row in cells) and index > 0
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    return drawn


def output_console() -> Console:
    """The console of results: as wide as the terminal, or a fixed width in files and pipes."""
    width = None if sys.stdout.isatty() else _TABLE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def human_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
