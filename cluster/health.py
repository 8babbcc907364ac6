"""Whether ranks that run are alive: pings, and the stacks of those that do not come back."""

from __future__ import annotations

import logging
import time

from cluster.transport import EngineEndpoint, PeerGone
from worker.wire import Channel, DumpStacks, Ping, Stacks, encode

_LOG = logging.getLogger("causeway.health")
_STACKS_S = 2.0  # how long the ranks may take to dump their stacks
_POLL_S = 0.05


class Heartbeat:
    """Pings every known rank and remembers who owes an answer."""

    def __init__(self, endpoint: EngineEndpoint, world: int, period_s: float) -> None:
        self._endpoint = endpoint
        self._world = world
        self._period_s = period_s
        self._number = 0
        self._next = 0.0
        self._owed_since: dict[int, float] = {}  # rank -> time of its oldest unanswered ping

    def reset(self) -> None:
        """Forget what is owed: nobody has read answers for a while."""
        self._owed_since.clear()

    def answered(self, rank: int) -> None:
        """Any Pong shows that the rank runs."""
        self._owed_since.pop(rank, None)

    def tick(self, now: float, allowed_s: float) -> int | None:
        """Ping when it is time; the rank that has been silent for too long, if there is one."""
        if now < self._next:
            return None
        self._next = now + self._period_s
        for rank, since in self._owed_since.items():
            if now - since > allowed_s:
                return rank
        self._number += 1
        payload = encode(Ping(number=self._number))
        for rank in range(self._world):
            if self._endpoint.known(rank, Channel.CONTROL):
                self._owed_since.setdefault(rank, now)
                try:
                    self._endpoint.send(rank, Channel.CONTROL, payload)
                except PeerGone:
                    continue  # stays owed
        return None


def collect_stacks(endpoint: EngineEndpoint, world: int) -> dict[int, str]:
    """Ask all ranks for their stacks and log them; rank -> text of those that answered."""
    payload = encode(DumpStacks())
    asked = [rank for rank in range(world) if endpoint.known(rank, Channel.CONTROL)]
    for rank in asked:
        try:
            endpoint.send(rank, Channel.CONTROL, payload)
        except PeerGone:
            continue
    stacks: dict[int, str] = {}
    until = time.monotonic() + _STACKS_S
    while time.monotonic() < until and len(stacks) < len(asked):
        received = endpoint.receive(_POLL_S)
        if received is not None and isinstance(received[2], Stacks):
            stacks[received[0]] = received[2].text
    for rank in range(world):
        _LOG.error("stacks of rank %d:\n%s", rank, stacks.get(rank, "(no answer)"))
    return stacks
