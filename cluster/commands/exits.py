"""Exit codes of ``launch.py`` and which error means which."""

from __future__ import annotations

from cluster.errors import CapacityError, ConfigError, EngineDead, RequestError, WorkerFailure
from cluster.retrieval import RetrievalError
from model.errors import CapacityError as MemoryTooSmall
from model.errors import CheckpointError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_UNEXPECTED = -1  # not an exit code: an error of ours, shown with its traceback


class InputError(ValueError):
    """An argument or an input file that cannot be used; the message names it and what is allowed."""


_BAD_INPUT = (
    ConfigError,
    RequestError,
    CheckpointError,
    RetrievalError,
    InputError,
    MemoryTooSmall,
)
_FAILURES = (WorkerFailure, EngineDead, CapacityError, OSError, ImportError)


def exit_code(error: BaseException) -> int:
    """Bad input, failure, or ``EXIT_UNEXPECTED`` for what nobody foresaw."""
    if isinstance(error, _BAD_INPUT):
        return EXIT_BAD_INPUT
    return EXIT_FAILURE if isinstance(error, _FAILURES) else EXIT_UNEXPECTED
