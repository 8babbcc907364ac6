"""Where a prompt's state is saved on the way, whatever comes behind."""

from __future__ import annotations


def inner_tails(start: int, end: int, *, block_size: int, interval: int) -> set[int]:
    """Block boundaries in ``start + 1 .. end`` worth a tail in a chunk of these tokens.

    Its end, and every ``interval`` blocks. The engine plans by this rule, and ``worker.rehearsal``
    runs the very steps that it asks for.
    """
    apart = interval * block_size
    found = set(range((start // apart + 1) * apart, end + 1, apart))
    if end % block_size == 0:
        found.add(end)
    return found
