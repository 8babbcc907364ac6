"""Token ids to text while they come: no half characters, and stop strings across token borders."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StopFinder:
    """Passes text on, except what might be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show now, and whether a stop string came: it ends before the first."""
        held = self._held + text
        starts = [index for index in map(held.find, self._stop) if index >= 0]
        if starts:
            self._held = ""
            return held[: min(starts)], True
        safe = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[safe:]
        return held[:safe], False

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Detokenizer:
    """One request's output text. Joined, its pieces are the tokens' bytes decoded as UTF-8.

    Bytes that are no UTF-8 become U+FFFD; an unfinished character waits for its rest.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...] = ()) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._finder = StopFinder(stop)

    def feed(self, token_id: int, *, check_stop: bool = True) -> tuple[str, bool]:
        """The text that token ``token_id`` completes, and whether a stop string ended the output.

        Without ``check_stop`` (before ``min_tokens``) nothing is held back or looked for.
        """
        text = self._utf8.decode(self._token_bytes(token_id))
        if not check_stop:
            return self._finder.flush() + text, False
        return self._finder.feed(text)

    def finish(self, *, check_stop: bool = True) -> tuple[str, bool]:
        """The rest at the end of the output; an unfinished character shows as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        if not check_stop:
            return self._finder.flush() + text, False
        shown, stopped = self._finder.feed(text)
        return (shown, True) if stopped else (shown + self._finder.flush(), False)
