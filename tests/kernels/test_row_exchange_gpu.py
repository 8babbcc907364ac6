"""Packed row streams on the GPU: the twin's rows."""

from __future__ import annotations

import pytest
import torch

from kernels import RowStream
from kernels.row_exchange import reference
from kernels.row_exchange.api import stream_offsets
from tests.helpers.gpu import DEVICE, Implementation
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
impl = Implementation("kernels.row_exchange.cuda_impl")


def streams_of(rank: int, counts: tuple[int, ...], local: int) -> tuple[RowStream, ...]:
    """Streams of odd and of model widths, strided and not, with indices and without."""
    torch.manual_seed(rank)

    def rows(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(count, width).to(dtype)

    def pick(count: int, of: int) -> torch.Tensor:
        return torch.randint(0, of, (count,), device=DEVICE)

    ring = column_slice(rows(50, 512, torch.bfloat16)).to(DEVICE)
    return (
        RowStream(
            local=rows(local, 512, torch.bfloat16).to(DEVICE),
            send=pick(counts[rank], local),
            counts=counts,
            carried=ring,
            carried_index=pick(7, 50),
        ),
        RowStream(
            local=column_slice(rows(local, 640, torch.float32), 4, 8).to(DEVICE),
            send=pick(counts[rank], local),
            counts=counts,
            carried=rows(9, 640, torch.float32).to(DEVICE),
        ),
        RowStream(
            local=rows(counts[rank], 33, torch.bfloat16).to(DEVICE), counts=counts, keep_local=False
        ),
        RowStream(
            local=rows(counts[rank], 5, torch.float32).byte().to(DEVICE),
            counts=counts,
            keep_local=False,
        ),
    )


@pytest.mark.parametrize("counts", [(3, 0, 5), (2100,) * 3, (0, 0, 0), (1,) * 9])
def test_the_twins_rows(counts: tuple[int, ...]) -> None:
    world = len(counts)
    every = [streams_of(r, counts, 2200) for r in range(world)]
    sent = [impl.pack_rows(s) for s in every]
    for rank, (streams, got) in enumerate(zip(every, sent, strict=True)):
        want = reference.pack_rows(streams)
        assert got.shape == want.shape
        for stream, start in zip(streams, stream_offsets(streams), strict=False):
            stop = start + counts[rank] * stream.row_bytes
            assert torch.equal(got[start:stop], want[start:stop])
    received = torch.cat(sent)
    for streams in every[:3]:
        buffers = impl.unpack_rows(received, streams)
        for got, want in zip(buffers, reference.unpack_rows(received, streams), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_nothing_at_all() -> None:
    local = torch.empty(0, 8, device=DEVICE)
    stream = RowStream(local=local, counts=(0,))
    packed = impl.pack_rows((stream,))
    assert packed.shape == (0,)
    assert impl.unpack_rows(packed, (stream,))[0].shape == (0, 8)
