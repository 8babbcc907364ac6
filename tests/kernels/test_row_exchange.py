"""Packed row streams: what every rank unpacks equals the rows put together one stream at a time.
Lists of rows that are copied at once."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    KernelContractError,
    RowCopy,
    RowStream,
    copy_rows,
    pack_rows,
    unpack_rows,
)
from tests.helpers.strided import column_slice, microseconds


def streams_of(rank: int) -> tuple[RowStream, ...]:
    """Three streams of rank ``rank`` of three; values name stream, rank and row."""

    def rows(stream: int, count: int, width: int) -> torch.Tensor:
        return (100 * stream + 10 * rank + torch.arange(count)).float()[:, None].repeat(1, width)

    send = [torch.tensor([3, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 1, 2])]
    ring = -torch.arange(1, 9).float()[:, None].repeat(1, 5)
    return (
        RowStream(
            local=column_slice(rows(1, 4, 5).bfloat16()),
            send=send[rank],
            counts=(2, 0, 3),
            carried=column_slice(ring.bfloat16()),
            carried_index=torch.tensor([7, 2]),
        ),
        RowStream(
            local=rows(2, 6, 3).double(),  # becomes the ring's dtype before it travels
            send=torch.tensor([rank]),
            counts=(1, 1, 1),
            carried=ring[:, :3],
        ),
        RowStream(local=rows(3, (2, 4, 0)[rank], 7).bfloat16(), counts=(2, 4, 0), keep_local=False),
    )


def expected(rank: int) -> list[torch.Tensor]:
    every = [streams_of(r) for r in range(3)]
    out = []
    for i, mine in enumerate(every[rank]):
        sent = [s[i].local if s[i].send is None else s[i].local[s[i].send] for s in every]
        parts = [mine.local, *sent] if mine.keep_local else sent
        if mine.carried is not None:
            index = mine.carried_index
            parts.append(mine.carried if index is None else mine.carried[index])
        out.append(torch.cat([p.to(mine.dtype) for p in parts]))
    return out


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_buffers_of_every_rank(rank: int) -> None:
    received = torch.cat([pack_rows(streams_of(r)) for r in range(3)])
    buffers = unpack_rows(received, streams_of(rank))
    for stream, got, want in zip(streams_of(rank), buffers, expected(rank), strict=True):
        assert got.dtype == want.dtype == stream.dtype
        assert got.shape == (stream.buffer_rows, stream.local.shape[1])
        assert torch.equal(got, want)


def test_nothing_travels() -> None:
    local = torch.randn(3, 4)
    ring = torch.randn(5, 4)
    alone = RowStream(local=local, send=torch.empty(0, dtype=torch.int64), counts=(0,))
    kept = RowStream(local=local[:0], counts=(0,), carried=ring, carried_index=torch.tensor([4, 0]))
    empty = RowStream(local=local[:0], counts=(0,), keep_local=False)
    packed = pack_rows((alone, kept, empty))
    assert packed.shape == (0,)
    first, second, third = unpack_rows(packed, (alone, kept, empty))
    assert torch.equal(first, local)
    assert torch.equal(second, ring[[4, 0]])
    assert third.shape == (0, 4)


def test_contract() -> None:
    good = streams_of(0)
    with pytest.raises(KernelContractError, match="streams: expected one or more"):
        pack_rows(())
    one = RowStream(local=torch.randn(3, 4), counts=(2, 2), send=torch.tensor([0]))
    with pytest.raises(KernelContractError, match=r"send: 1 rows, but the ranks publish \(2, 2\)"):
        pack_rows((one,))
    with pytest.raises(KernelContractError, match="counts: expected 3 counts"):
        pack_rows((good[0], one))
    with pytest.raises(KernelContractError, match="carried_index without carried rows"):
        pack_rows((RowStream(local=torch.randn(2, 4), counts=(2,), carried_index=good[0].send),))
    with pytest.raises(KernelContractError, match=r"carried: expected shape \[any, 4\]"):
        pack_rows((RowStream(local=torch.randn(2, 4), counts=(2,), carried=torch.randn(2, 5)),))
    with pytest.raises(KernelContractError, match="received: expected shape"):
        unpack_rows(pack_rows(good), good)


def test_copies() -> None:
    ring = torch.zeros(6, 8)
    some = torch.arange(10.0)[:, None].repeat(1, 3)
    wide, whole, empty = torch.zeros(4, 3), torch.zeros(2, 2, dtype=torch.uint8), torch.empty(0, 3)
    given = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    copy_rows(
        (
            RowCopy(
                source=some,
                source_index=torch.tensor([9, 4, 4]),
                target=ring[:, 4:7],
                target_index=torch.tensor([5, 0, 2]),
            ),
            RowCopy(source=some, source_index=torch.tensor([1, 3, 5, 7]), target=wide),
            RowCopy(source=given, target=whole),
            RowCopy(source=some, source_index=none, target=empty),
        )
    )
    want = torch.zeros(6, 8)
    want[5, 4:7], want[0, 4:7], want[2, 4:7] = 9, 4, 4
    assert torch.equal(ring, want)
    assert wide[:, 0].tolist() == [1, 3, 5, 7]
    assert torch.equal(whole, given)
    copy_rows(())


def test_contract_of_copies() -> None:
    rows, index = torch.randn(3, 4), torch.tensor([0])
    with pytest.raises(KernelContractError, match="3 rows, but 1 places"):
        copy_rows((RowCopy(source=rows, target=rows.clone(), target_index=index),))
    with pytest.raises(KernelContractError, match=r"target: expected shape \[any, 4\]"):
        copy_rows((RowCopy(source=rows, target=torch.empty(3, 5)),))
    with pytest.raises(KernelContractError, match="target: expected dtype"):
        copy_rows((RowCopy(source=rows, target=rows.double()),))
    with pytest.raises(KernelContractError, match="source_index: expected dtype int64"):
        copy_rows((RowCopy(source=rows, source_index=index.int(), target=rows[:1].clone()),))


@pytest.mark.benchmark
def test_speed() -> None:
    streams = streams_of(0)
    print(f"pack_rows 3 streams: {microseconds(lambda: pack_rows(streams)):.0f} us")
