"""The verbs of ``launch.py``: parsing, exit codes, signals. What a verb does is in ``commands/``.

Results go to stdout, everything else to stderr. Exit codes: 0 ok, 2 bad input, 1 failure, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol, cast

from cluster.commands.exits import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED, exit_code

ROOT = Path(__file__).resolve().parent.parent
_SIGTERM_EXIT = 128 + signal.SIGTERM


class Command(Protocol):
    """What a module in ``cluster/commands`` offers."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: the module that runs it and one line for ``--help``."""

    module: str
    summary: str


VERBS = {
    "generate": Verb("cluster.commands.generate", "stream text for prompts or token ids"),
    "score": Verb("cluster.commands.score", "logits of given tokens, teacher-forced"),
    "make-tiny": Verb("cluster.commands.make_tiny", "write a tiny random checkpoint"),
    "check": Verb("cluster.commands.check", "validate config and checkpoint, print the plan"),
    "plan": Verb("cluster.commands.plan", "memory and traffic for a machine that is not here"),
    "eval": Verb("cluster.commands.evaluate", "benchmarks: retrieval"),
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the named verb's module is loaded and gets its arguments."""
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="Causeway: context-parallel serving of DeepSeek V4.",
        epilog="Exit codes: 0 ok, 2 bad input, 1 failure, 130 Ctrl-C.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, entry in VERBS.items():
        sub = verbs.add_parser(name, help=entry.summary, description=entry.summary)
        if name == verb:
            command = _command(entry)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one verb; the process's exit code."""
    verb = next((word for word in argv if not word.startswith("-")), None)
    signal.signal(signal.SIGINT, _leave_imports)
    args = build_parser(verb).parse_args(argv)
    _share_import_path()
    # Also where the shell that started us in the background had SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout went away (``| head``); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as err:
        code = exit_code(err)
        if code not in (EXIT_BAD_INPUT, EXIT_FAILURE):
            raise
        print(f"error: {err}", file=sys.stderr)
        return code


def _command(verb: Verb) -> Command:
    return cast("Command", importlib.import_module(verb.module))


def _share_import_path() -> None:
    """Let every child process find the four packages, wherever it starts."""
    known = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if str(ROOT) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *known])


def _leave_imports(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C while modules load, when nothing has been started: extension modules swallow exceptions."""
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: by an exception, so that the ranks are ended too."""
    raise SystemExit(_SIGTERM_EXIT)
