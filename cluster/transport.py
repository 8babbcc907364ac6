"""ZMQ sockets of the step messages: one ROUTER at the engine, two DEALERs at every rank.

Only frames that ``worker.wire`` accepts get through; everything else is dropped with a log line. A rank
is reachable once its signed Hello has come: an unsigned peer cannot take a rank's place.
"""

from __future__ import annotations

import errno
import logging

import zmq

from worker.wire import (
    FRAME_OVERHEAD,
    Channel,
    Direction,
    Opener,
    Sealer,
    ToEngine,
    ToRank,
    WireError,
    decode_to_engine,
    decode_to_rank,
    encode,
)

_LOG = logging.getLogger("causeway.transport")
_LINGER_MS = 1000  # what a closing socket may still send


class PeerGone(Exception):
    """The rank's socket is not there (any more)."""


class EngineEndpoint:
    """The engine's end. Used by one thread; ``close`` frees the port."""

    def __init__(self, host: str, key: bytes, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._key = key
        self._max_bytes = max_bytes
        self._opener = Opener(key, Direction.TO_ENGINE, max_bytes)
        self._sealers: dict[tuple[int, Channel], Sealer] = {}
        self._identities: dict[tuple[int, Channel], bytes] = {}
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown peer is an error, not silence
        self._socket.setsockopt(zmq.SNDTIMEO, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        try:
            self.address = _bind(self._socket, host)
        except zmq.ZMQError:
            self.close()
            raise

    def known(self, rank: int, channel: Channel) -> bool:
        """Whether the rank's Hello on that channel has come."""
        return (rank, channel) in self._identities

    def send(self, rank: int, channel: Channel, payload: bytes) -> None:
        """Send an encoded message to one rank.

        Raises:
            PeerGone: the rank never said Hello, has left, or takes no messages.
            WireError: the message is too large.
        """
        peer = (rank, channel)
        identity = self._identities.get(peer)
        if identity is None:
            raise PeerGone(f"rank {rank} has not said hello")
        try:
            self._socket.send_multipart([identity, *self._sealers[peer].seal(payload)])
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, zmq.EAGAIN):
                raise PeerGone(f"rank {rank} cannot be reached: {error}") from error
            raise

    def receive(self, timeout_s: float) -> tuple[int, Channel, ToEngine] | None:
        """The next accepted message with its sender; None when none came in time."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        parts = self._socket.recv_multipart(copy=False)
        identity = bytes(parts[0].buffer)
        if len(parts) != 3:
            _LOG.warning("dropped a message of %d parts", len(parts))
            return None
        try:
            head = bytes(parts[1].buffer[: FRAME_OVERHEAD + 1])  # longer ones are refused anyway
            rank, channel = self._opener.open(head, parts[2].buffer)
            message = decode_to_engine(parts[2].buffer)
        except WireError as error:
            _LOG.warning("dropped a message: %s", error)
            return None
        peer = (rank, channel)
        if peer not in self._identities:
            self._identities[peer] = identity
            self._sealers[peer] = Sealer(
                self._key, Direction.TO_RANK, channel, rank, self._max_bytes
            )
        return rank, channel, message

    def close(self) -> None:
        """Free the port; unsent messages are dropped."""
        self._socket.close()
        self._context.term()


class RankLink:
    """One socket of a rank. Used by one thread."""

    def __init__(
        self,
        address: str,
        key: bytes,
        rank: int,
        channel: Channel,
        max_bytes: int,
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self._me = (rank, channel)
        self._sealer = Sealer(key, Direction.TO_ENGINE, channel, rank, max_bytes)
        self._opener = Opener(key, Direction.TO_RANK, max_bytes)
        self.socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        if address.startswith("tcp://["):
            self.socket.setsockopt(zmq.IPV6, 1)
        self.socket.connect(address)

    def send(self, message: ToEngine) -> None:
        """Send a message to the engine.

        Raises:
            WireError: the message is too large.
        """
        self.socket.send_multipart(self._sealer.seal(encode(message)))

    def receive(self, timeout_s: float | None = None) -> ToRank | None:
        """The next accepted message; None when none came in time (None waits for ever)."""
        if not self.socket.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))):
            return None
        parts = self.socket.recv_multipart()
        if len(parts) != 2:
            _LOG.warning("dropped a message of %d parts", len(parts))
            return None
        try:
            if self._opener.open(parts[0], parts[1]) != self._me:
                raise WireError("meant for another rank or channel")
            return decode_to_rank(parts[1])
        except WireError as error:
            _LOG.warning("dropped a message: %s", error)
            return None

    def close(self) -> None:
        """Send what is queued (for a second at most) and close."""
        self.socket.close()
        self._context.term()


def _bind(socket: zmq.Socket[bytes], host: str) -> str:
    """Bind a port of the system's choice on one address; returns ``tcp://host:port``."""
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
    socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
