"""Where the engine's events wait for whoever reads them: an iterator, or the caller of ``step``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from cluster.errors import RequestError
from cluster.events import RequestEvent


class Mailbox:
    """Sorts events by reader. Iterators drive the engine by ``advance`` when they have no news."""

    def __init__(self, advance: Callable[[], None], abort: Callable[[int], bool]) -> None:
        self._advance = advance
        self._abort = abort
        self._unclaimed: list[RequestEvent] = []
        self._inboxes: dict[int, deque[RequestEvent]] = {}

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would return anything."""
        return bool(self._unclaimed)

    def post(self, event: RequestEvent) -> None:
        """Deliver an event."""
        self._inboxes.get(event.request_id, self._unclaimed).append(event)

    def take(self) -> list[RequestEvent]:
        """The news of requests that no iterator reads."""
        events, self._unclaimed = self._unclaimed, []
        return events

    def submit(self, adders: SequenceOf[Callable[[], int]]) -> Iterator[RequestEvent]:
        """Call every adder (it queues a request and gives its id); an iterator of their events.

        If one raises RequestError, what was queued is aborted without a word. Closing the iterator
        early aborts the rest too.
        """
        inbox: deque[RequestEvent] = deque()
        ids: list[int] = []
        try:
            for add in adders:
                ids.append(add())
                self._inboxes[ids[-1]] = inbox
        except RequestError:
            self._leave(ids)
            raise
        return self._read(ids, inbox)

    def _read(self, ids: list[int], inbox: deque[RequestEvent]) -> Iterator[RequestEvent]:
        left = len(ids)
        try:
            while left:
                while inbox:
                    event = inbox.popleft()
                    left -= event.finished
                    yield event
                if left:
                    self._advance()
        finally:
            self._leave(ids)

    def _leave(self, ids: list[int]) -> None:
        for request_id in ids:
            self._abort(request_id)  # nothing happens to those that have ended
            self._inboxes.pop(request_id, None)
