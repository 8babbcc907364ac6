"""Frames between engine and ranks: signed, counted, typed; everything else is dropped and logged."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from cluster.transport import EngineEndpoint, PeerGone, RankLink
from worker.protocol import (
    CacheInfo,
    DecodeSlice,
    PrefillSlice,
    SamplingParams,
    SliceOutput,
    SlotInit,
    StepOutput,
    StepPlan,
    TailSave,
    TokenLogprobs,
)
from worker.wire import (
    FRAME_OVERHEAD,
    KEY_BYTES,
    Channel,
    Direction,
    Done,
    DumpStacks,
    Failed,
    Hello,
    Join,
    Opener,
    Ping,
    Pong,
    Progress,
    Ready,
    Sealer,
    Shutdown,
    Stacks,
    Step,
    StoreReady,
    WireError,
    decode_to_engine,
    decode_to_rank,
    encode,
)

KEY = bytes(range(KEY_BYTES))
MAX = 1 << 20

PLAN = StepPlan(
    step_id=7,
    phase="prefill",
    inits=[
        SlotInit(
            request_id=1,
            slot=2,
            sampling=SamplingParams(temperature=0.5, seed=(1 << 63) - 1),
            num_prompt_tokens=3,
        )
    ],
    prefill=[
        PrefillSlice(
            request_id=1,
            slot=2,
            start=0,
            token_ids=[1, 2, 3],
            save_tails=[TailSave(position=2, tail=0)],
        )
    ],
    decode=[DecodeSlice(request_id=4, slot=0, position=9, num_tokens=2)],
)
OUTPUT = StepOutput(
    step_id=7,
    rank=0,
    outputs=[
        SliceOutput(
            request_id=1,
            token_ids=[5],
            logits=bytes(64),
            logprobs=[TokenLogprobs(token_id=5, logprob=-0.5, rank=1, top=[(5, -0.5)])],
        )
    ],
    seconds=0.25,
)
INFO = CacheInfo(
    num_blocks=1,
    block_size=128,
    num_slots=1,
    num_tails=0,
    max_model_len=99,
    allocated_bytes=5,
    weight_bytes=6,
)


def sealer(rank: int = 1, key: bytes = KEY, max_bytes: int = MAX) -> Sealer:
    return Sealer(key, Direction.TO_ENGINE, Channel.DATA, rank, max_bytes)


def opener(max_bytes: int = MAX) -> Opener:
    return Opener(KEY, Direction.TO_ENGINE, max_bytes)


@pytest.mark.parametrize(
    "message",
    [
        Hello(rank=1, pid=2),
        StoreReady(init_method="tcp://127.0.0.1:1"),
        Progress(rank=0, phase="load", seconds=1.5, fraction=0.5),
        Ready(rank=0, info=INFO),
        Done(output=OUTPUT),
        Failed(rank=1, phase="decode", step_id=3, detail="ValueError: x", traceback="..."),
        Pong(rank=1, number=3, phase="idle", step_id=-1),
        Stacks(rank=0, text="Thread"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_messages_to_the_engine(message: object) -> None:
    assert decode_to_engine(encode(message)) == message  # type: ignore[arg-type]
    with pytest.raises(WireError):
        decode_to_rank(encode(message))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [Join(init_method="tcp://h:1"), Step(plan=PLAN), Ping(number=9), DumpStacks(), Shutdown()],
    ids=lambda m: type(m).__name__,
)
def test_messages_to_a_rank(message: object) -> None:
    assert decode_to_rank(encode(message)) == message  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x80\x04\x95",  # the beginning of a pickle
        msgspec.msgpack.encode({"type": "Unknown"}),
        msgspec.msgpack.encode({"type": "Hello", "rank": "one", "pid": 1}),
        msgspec.msgpack.encode({"type": "Hello", "rank": 1}),
        msgspec.msgpack.encode([1, 2]),
    ],
)
def test_untyped_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_to_engine(payload)


def test_seal_and_open() -> None:
    seal, check = sealer(rank=3), opener()
    for text in (b"a", b"", b"x" * 1000):
        head, payload = seal.seal(text)
        assert len(head) == FRAME_OVERHEAD
        assert payload is text
        assert check.open(head, payload) == (3, Channel.DATA)


@pytest.mark.parametrize("position", range(FRAME_OVERHEAD))
def test_every_byte_of_the_head_is_protected(position: int) -> None:
    head, payload = sealer().seal(b"payload")
    bad = bytearray(head)
    bad[position] ^= 1
    with pytest.raises(WireError):
        opener().open(bytes(bad), payload)


def test_wrong_payload_key_or_length() -> None:
    head, payload = sealer().seal(b"payload")
    check = opener()
    for bad_head, bad_payload in (
        (head, b"Payload"),
        (head, payload + b"\0"),
        (head[:-1], payload),
        (head + b"\0", payload),
        (b"", b""),
    ):
        with pytest.raises(WireError):
            check.open(bad_head, bad_payload)
    other = sealer(key=secrets.token_bytes(KEY_BYTES)).seal(b"payload")
    with pytest.raises(WireError, match="not signed"):
        check.open(other[0], other[1])
    check.open(head, payload)  # refused frames leave the counter alone
    with pytest.raises(WireError, match="a key of 3 bytes"):
        sealer(key=b"abc")


def test_replayed_and_reordered_frames() -> None:
    seal, check = sealer(), opener()
    first, second, third = (seal.seal(b"x") for _ in range(3))
    check.open(*first)
    with pytest.raises(WireError, match="replayed"):
        check.open(*first)
    check.open(*third)
    with pytest.raises(WireError, match="replayed"):
        check.open(*second)
    check.open(*sealer(rank=2).seal(b"x"))  # every rank counts for itself


def test_reflected_frames() -> None:
    """What the engine signed for a rank is no message from that rank."""
    to_rank = Sealer(KEY, Direction.TO_RANK, Channel.DATA, 1, MAX).seal(b"x")
    with pytest.raises(WireError, match="direction"):
        opener().open(*to_rank)


def test_oversized_frames() -> None:
    with pytest.raises(WireError, match="max_message_bytes"):
        sealer(max_bytes=100).seal(b"x" * 100)
    head, payload = sealer().seal(b"x" * 100)
    with pytest.raises(WireError, match="allowed 100"):
        opener(max_bytes=100).open(head, payload)


@pytest.fixture
def endpoint() -> Iterator[EngineEndpoint]:
    end = EngineEndpoint("127.0.0.1", KEY, MAX)
    yield end
    end.close()


def link_to(endpoint: EngineEndpoint, rank: int = 0, key: bytes = KEY) -> RankLink:
    return RankLink(endpoint.address, key, rank, Channel.DATA, MAX)


def test_endpoint_round_trip(endpoint: EngineEndpoint) -> None:
    assert endpoint.address.startswith("tcp://127.0.0.1:")
    link = link_to(endpoint, rank=1)
    try:
        assert not endpoint.known(1, Channel.DATA)
        with pytest.raises(PeerGone, match="rank 1"):
            endpoint.send(1, Channel.DATA, encode(Shutdown()))
        link.send(Hello(rank=1, pid=5))
        assert endpoint.receive(5) == (1, Channel.DATA, Hello(rank=1, pid=5))
        endpoint.send(1, Channel.DATA, encode(Step(plan=PLAN)))
        assert link.receive(5) == Step(plan=PLAN)
        link.send(Done(output=OUTPUT))
        assert endpoint.receive(5) == (1, Channel.DATA, Done(output=OUTPUT))
        assert endpoint.receive(0) is None
    finally:
        link.close()


def test_forged_frames_are_dropped_with_a_log_line(
    endpoint: EngineEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    forger = link_to(endpoint, key=secrets.token_bytes(KEY_BYTES))
    honest = link_to(endpoint)
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.linger = 0
    raw.connect(endpoint.address)
    try:
        forger.send(Hello(rank=0, pid=1))
        raw.send_multipart([b"short", b"x"])
        raw.send_multipart([b"one part"])
        raw.send_multipart([b"a", b"b", b"c", b"d"])
        with caplog.at_level(logging.WARNING):
            for _ in range(4):
                assert endpoint.receive(5) is None
        dropped = [r for r in caplog.records if "dropped" in r.getMessage()]
        assert len(dropped) == 4
        assert any("not signed" in r.getMessage() for r in dropped)
        assert not endpoint.known(0, Channel.DATA)
        honest.send(Hello(rank=0, pid=2))
        assert endpoint.receive(5) == (0, Channel.DATA, Hello(rank=0, pid=2))
    finally:
        forger.close()
        honest.close()
        raw.close()
        context.term()


def test_a_rank_refuses_what_is_not_for_it(
    endpoint: EngineEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    link = link_to(endpoint, rank=0)
    context = zmq.Context()
    evil = context.socket(zmq.ROUTER)
    evil.linger = 0
    port = evil.bind_to_random_port("tcp://127.0.0.1")
    lured = RankLink(f"tcp://127.0.0.1:{port}", KEY, 0, Channel.DATA, MAX)
    try:
        lured.send(Hello(rank=0, pid=1))
        identity = evil.recv_multipart()[0]
        for_other = Sealer(KEY, Direction.TO_RANK, Channel.DATA, 1, MAX)
        unsigned = Sealer(bytes(KEY_BYTES), Direction.TO_RANK, Channel.DATA, 0, MAX)
        with caplog.at_level(logging.WARNING):
            for frame in (for_other.seal(encode(Shutdown())), unsigned.seal(encode(Shutdown()))):
                evil.send_multipart([identity, *frame])
                assert lured.receive(5) is None
        assert "another rank" in caplog.text
        assert "not signed" in caplog.text
    finally:
        for end in (link, lured):
            end.close()
        evil.close()
        context.term()


def test_the_host_must_be_ours() -> None:
    with pytest.raises(zmq.ZMQError):
        EngineEndpoint("203.0.113.7", KEY, MAX)
