"""Packed row streams and copies of rows on the GPU: the twin's rows."""

from __future__ import annotations

import pytest
import torch

from kernels import RowCopy, RowStream
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


@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_copies(count: int) -> None:
    """Of odd and of model widths, from and to columns of wider tensors, with each kind of index."""
    torch.manual_seed(count)
    made = []
    for width, lead, dtype in (
        (512, 0, torch.bfloat16),
        (2560, 4, torch.float32),
        (6, 2, torch.int64),
        (33, 3, torch.uint8),
        (4096, 16, torch.float8_e4m3fn),
    ):
        source = (100 * torch.randn(count + 5, width + lead, device=DEVICE)).to(dtype)[:, lead:]
        for gathers, scatters in ((False, False), (True, False), (False, True), (True, True)):
            index = torch.randint(0, count + 5, (count,), device=DEVICE) if gathers else None
            places = torch.randperm(count + 9, device=DEVICE)[:count] if scatters else None
            target = torch.zeros(count + 9, width + 2 * lead, device=DEVICE).to(dtype)
            made.append((source if gathers else source[:count], index, places, target, lead, width))

    def copies() -> tuple[tuple[RowCopy, ...], list[torch.Tensor]]:
        found, targets = [], []
        for source, index, places, target, lead, width in made:
            targets.append(target.clone())
            inside = targets[-1][:, lead : lead + width]
            found.append(
                RowCopy(
                    source=source,
                    source_index=index,
                    target=inside[:count] if places is None else inside,
                    target_index=places,
                )
            )
        return tuple(found), targets

    ours, got = copies()
    impl.copy_rows(ours)
    theirs, want = copies()
    reference.copy_rows(theirs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
