"""Messages between the engine and the ranks: typed msgpack, signed, counted; nothing is ever unpickled.

A frame is ``header | mac | payload``. The header names the protocol, the direction, the channel, the
rank and a sequence number; the mac is HMAC-SHA256 with the gang's random key over header and payload.
A receiver refuses a frame that is too large, unsigned, for somebody else, or not newer than the last.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import TypeAlias

import msgspec

from worker.protocol import CacheInfo, StepOutput, StepPlan

KEY_BYTES = 32
DEFAULT_MAX_BYTES = 1 << 30

_MAGIC = b"CWY1"
_HEADER = struct.Struct("!4sBBIQ")  # magic, direction, channel, rank, sequence number
_MAC_BYTES = hashlib.sha256().digest_size
FRAME_OVERHEAD = _HEADER.size + _MAC_BYTES


class WireError(Exception):
    """A frame that must not be used or cannot be sent; the message says why."""


class Channel(IntEnum):
    """A rank has two sockets: its main thread's, and that of the thread which answers pings."""

    DATA = 0
    CONTROL = 1


class Direction(IntEnum):
    """Who wrote a frame; keeps a reflected frame from being taken for an answer."""

    TO_RANK = 0
    TO_ENGINE = 1


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the class name is the tag."""


class Hello(_Message, frozen=True, kw_only=True):
    """First message on each channel: the engine learns where the rank's socket is."""

    rank: int
    pid: int


class StoreReady(_Message, frozen=True, kw_only=True):
    """Rank 0 serves the rendezvous store; ``init_method`` is ``tcp://host:port``."""

    init_method: str


class Progress(_Message, frozen=True, kw_only=True):
    """Where a rank is in its start: ``fraction`` runs from 0 to 1 within ``phase``."""

    rank: int
    phase: str
    seconds: float
    fraction: float


class Ready(_Message, frozen=True, kw_only=True):
    """The rank can take steps."""

    rank: int
    info: CacheInfo


class Done(_Message, frozen=True, kw_only=True):
    """A step's result."""

    output: StepOutput


class Failed(_Message, frozen=True, kw_only=True):
    """The rank raised; ``detail`` is one line, ``traceback`` the whole text."""

    rank: int
    phase: str
    step_id: int
    detail: str
    traceback: str = ""


class Pong(_Message, frozen=True, kw_only=True):
    """Answer to Ping number ``number``; says what the main thread is at."""

    rank: int
    number: int
    phase: str
    step_id: int


class Stacks(_Message, frozen=True, kw_only=True):
    """Python stacks of all threads of a rank, innermost frame first."""

    rank: int
    text: str


class Join(_Message, frozen=True, kw_only=True):
    """Build the world over the store at ``init_method``."""

    init_method: str


class Step(_Message, frozen=True, kw_only=True):
    """Run one step."""

    plan: StepPlan


class Ping(_Message, frozen=True, kw_only=True):
    """Are you there?"""

    number: int


class DumpStacks(_Message, frozen=True, kw_only=True):
    """Answer with Stacks."""


class Shutdown(_Message, frozen=True, kw_only=True):
    """Close the worker and leave."""


ToEngine: TypeAlias = Hello | StoreReady | Progress | Ready | Done | Failed | Pong | Stacks
ToRank: TypeAlias = Join | Step | Ping | DumpStacks | Shutdown

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)


def encode(message: ToEngine | ToRank) -> bytes:
    """The payload of a message; one encoding may be sealed for several ranks."""
    return _ENCODER.encode(message)


def decode_to_engine(payload: bytes | memoryview) -> ToEngine:
    """Read a payload from a rank.

    Raises:
        WireError: not one of our messages.
    """
    try:
        return _TO_ENGINE.decode(payload)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message to the engine: {error}") from error


def decode_to_rank(payload: bytes | memoryview) -> ToRank:
    """Read a payload from the engine.

    Raises:
        WireError: not one of our messages.
    """
    try:
        return _TO_RANK.decode(payload)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message to a rank: {error}") from error


class Sealer:
    """Signs and numbers the frames of one sender on one channel of one rank."""

    def __init__(
        self, key: bytes, direction: Direction, channel: Channel, rank: int, max_bytes: int
    ) -> None:
        self._key = _checked_key(key)
        self._direction = direction
        self._channel = channel
        self._rank = rank
        self._max_bytes = max_bytes
        self._sequence = 0

    def seal(self, payload: bytes) -> list[bytes]:
        """The frame's parts: ``header + mac`` and the payload itself, which is not copied.

        Raises:
            WireError: the frame would be refused for its size.
        """
        size = FRAME_OVERHEAD + len(payload)
        if size > self._max_bytes:
            raise WireError(
                f"a message of {size} bytes is over cluster.max_message_bytes ({self._max_bytes}); "
                "raise it, or lower scheduler.max_batched_tokens"
            )
        self._sequence += 1
        header = _HEADER.pack(_MAGIC, self._direction, self._channel, self._rank, self._sequence)
        return [header + _mac(self._key, header, payload), payload]


class Opener:
    """Checks the frames that arrive at one end and remembers how far each sender has counted."""

    def __init__(self, key: bytes, direction: Direction, max_bytes: int) -> None:
        self._key = _checked_key(key)
        self._direction = direction
        self._max_bytes = max_bytes
        self._last: dict[tuple[int, Channel], int] = {}

    def open(self, head: bytes, payload: bytes | memoryview) -> tuple[int, Channel]:
        """Check one frame (its two parts); returns the rank and channel it belongs to.

        Raises:
            WireError: too large, malformed, not signed with the gang's key, or not newer than the
                last frame of that channel.
        """
        size = len(head) + len(payload)
        if size > self._max_bytes:
            raise WireError(f"{size} bytes, allowed {self._max_bytes}")
        if len(head) != FRAME_OVERHEAD:
            raise WireError(f"a head of {len(head)} bytes, expected {FRAME_OVERHEAD}")
        header, mac = head[: _HEADER.size], head[_HEADER.size :]
        if not hmac.compare_digest(mac, _mac(self._key, header, payload)):
            raise WireError("not signed with this gang's key")
        magic, direction, channel, rank, sequence = _HEADER.unpack(header)
        if magic != _MAGIC or direction != self._direction:
            raise WireError(f"magic {magic!r}, direction {direction}")
        sender = (rank, Channel(channel))
        last = self._last.get(sender, 0)
        if sequence <= last:
            raise WireError(f"frame {sequence} of rank {rank} after frame {last}: replayed")
        self._last[sender] = sequence
        return sender


def _checked_key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise WireError(f"a key of {len(key)} bytes, expected {KEY_BYTES}")
    return key


def _mac(key: bytes, header: bytes, payload: bytes | memoryview) -> bytes:
    digest = hmac.new(key, header, hashlib.sha256)
    digest.update(payload)
    return digest.digest()
