"""The message a rank's process is started with, over its stdin or its actor's constructor."""

from __future__ import annotations

import os
from typing import IO

import msgspec

from cluster.config import Failpoint
from worker.config import WorkerConfig

WORKER_CLASS = "worker.worker:Worker"
STORE_MODULE = "worker.rendezvous"

_LENGTH_BYTES = 4


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a rank is started with; holds the key, so it never goes on a command line."""

    config: WorkerConfig
    rank: int
    device_index: int  # CUDA device, counted within those the process sees
    key: bytes
    engine: str  # tcp://host:port of the engine
    store_host: str  # where rank 0 serves the rendezvous store
    env: dict[str, str]  # set before torch is imported
    start_deadline_s: float
    max_message_bytes: int
    generation: int = 0
    failpoints: tuple[Failpoint, ...] = ()
    worker_class: str = WORKER_CLASS  # module:class; tests bring their own
    store_module: str = STORE_MODULE  # module with serve_store
    die_with_parent: bool = False  # the starting thread lives as long as the parent (Linux)


def encode_start(start: RankStart) -> bytes:
    """As typed msgpack."""
    return msgspec.msgpack.encode(start)


def decode_start(data: bytes) -> RankStart:
    """Raises msgspec.MsgspecError when it is no RankStart."""
    return msgspec.msgpack.decode(data, type=RankStart)


def write_start(stream: IO[bytes], start: RankStart) -> None:
    """Write to a child's stdin, which stays open: its end of file is our death."""
    payload = encode_start(start)
    stream.write(len(payload).to_bytes(_LENGTH_BYTES, "big") + payload)
    stream.flush()


def read_start(fd: int) -> RankStart:
    """Read what ``write_start`` wrote, and not a byte more.

    Raises:
        EOFError: the writer went away.
    """
    length = int.from_bytes(_read_exactly(fd, _LENGTH_BYTES), "big")
    return decode_start(_read_exactly(fd, length))


def _read_exactly(fd: int, count: int) -> bytes:
    """Read without buffering, so that nothing of the pipe is hidden from who watches it."""
    data = b""
    while len(data) < count:
        part = os.read(fd, count - len(data))
        if not part:
            raise EOFError("the engine's process went away before it sent the start message")
        data += part
    return data
