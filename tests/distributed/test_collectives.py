"""Collectives on real gloo ranks: uneven and empty rows, every dtype, bytes as predicted."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.parallel.collectives import Group
from model.parallel.config import MeshCoord, ParallelConfig
from model.parallel.mesh import ParallelMesh, build_mesh
from model.parallel.partition import (
    Chunk,
    RowPlan,
    cut,
    entry_plan,
    group_wants,
    local_tokens,
    plan_rows,
    window_wants,
)
from tests.helpers.ranks import RankError, run_ranks

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
]


def rows(rank: int, count: int, dtype: torch.dtype, width: tuple[int, ...] = (3,)) -> torch.Tensor:
    """Rows that name their rank and index; exact in every dtype."""
    base = (torch.arange(count) % 8 + 8 * rank).float().view(-1, *[1] * len(width))
    return base.expand(count, *width).contiguous().to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def check_gathers(world: Group) -> None:
    size, rank = world.size, world.rank
    for dtype in DTYPES:
        expected = torch.cat([rows(r, 4, dtype) for r in range(size)])
        assert same(world.all_gather(rows(rank, 4, dtype)), expected)
        for counts in (list(range(size)), [5] + [0] * (size - 1), [2] * size, [0] * size):
            out = world.all_gather_v(rows(rank, counts[rank], dtype), counts)
            assert same(out, torch.cat([rows(r, n, dtype) for r, n in enumerate(counts)])), counts
    counts = [3 + r for r in range(size)]
    for width in ((), (2, 5), (0,)):  # one value, several axes, no values per row
        out = world.all_gather_v(rows(rank, counts[rank], torch.bfloat16, width), counts)
        assert same(out, torch.cat([rows(r, n, out.dtype, width) for r, n in enumerate(counts)]))
    fused = torch.cat([rows(rank, counts[rank], torch.bfloat16)] * 2, 1)
    strided = fused[:, 3:]  # a column slice, as of a fused projection
    assert not strided.is_contiguous()
    expected = torch.cat([rows(r, n, torch.bfloat16) for r, n in enumerate(counts)])
    assert same(world.all_gather_v(strided, counts), expected)


def check_reductions(world: Group) -> None:
    size, rank = world.size, world.rank
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(rank, 6, dtype)
        out = world.all_reduce(x)
        assert out is x
        assert same(x, sum(rows(r, 6, torch.float32) for r in range(size)).to(dtype))
        assert same(world.all_reduce(rows(rank, 6, dtype), "max"), rows(size - 1, 6, dtype))
    padded = torch.full((4, 6), -1.0)
    view = padded[:, :3]
    view.copy_(rows(rank, 4, torch.float32))
    assert world.all_reduce(view) is view
    assert same(view, sum(rows(r, 4, torch.float32) for r in range(size)))
    assert (padded[:, 3:] == -1).all()
    assert world.all_reduce(torch.empty(0, 3)).shape == (0, 3)
    noise = torch.randn(1001, generator=torch.Generator().manual_seed(rank))
    bits = world.all_gather(world.all_reduce(noise).view(1, -1))
    assert (bits == bits[0]).all()
    full = torch.arange(2 * size).float().view(-1, 1) * (rank + 1)
    part = world.reduce_scatter(full)
    factor = size * (size + 1) / 2
    assert part.flatten().tolist() == [2 * rank * factor, (2 * rank + 1) * factor]


def check_all_to_all(world: Group) -> None:
    size, rank = world.size, world.rank

    def count(source: int, dest: int) -> int:
        return (source * 2 + dest * 3) % 4  # some pairs exchange nothing

    def payload(source: int, dest: int, dtype: torch.dtype) -> torch.Tensor:
        return (rows(source, count(source, dest), torch.float32) + 32 * dest).to(dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
        send = [count(rank, d) for d in range(size)]
        recv = [count(s, rank) for s in range(size)]
        x = torch.cat([payload(rank, d, dtype) for d in range(size)])
        expected = torch.cat([payload(s, rank, dtype) for s in range(size)])
        assert same(world.all_to_all_v(x, send, recv), expected)
    nothing = world.all_to_all_v(torch.empty(0, 7), [0] * size, [0] * size)
    assert nothing.shape == (0, 7)
    # Only rank 0 has rows, all for the last rank.
    send = [0] * (size - 1) + [5 if rank == 0 else 0]
    recv = [5 if rank == size - 1 else 0] + [0] * (size - 1)
    out = world.all_to_all_v(rows(0, sum(send), torch.float32), send, recv)
    assert same(out, rows(0, sum(recv), torch.float32))


def check_broadcast(world: Group) -> None:
    src = world.size - 1
    for dtype in DTYPES:
        x = rows(world.rank, 5, dtype)
        assert world.broadcast(x, src) is x
        assert same(x, rows(src, 5, dtype))
    columns = torch.zeros(5, 6)
    columns[:, ::2] = rows(world.rank, 5, torch.float32)
    world.broadcast(columns[:, ::2], src)
    assert same(columns[:, ::2], rows(src, 5, torch.float32))
    assert not columns[:, 1::2].any()
    world.barrier()


def check_errors(world: Group) -> None:
    with pytest.raises(ValueError, match=r"allowed: .* counts >= 0"):
        world.all_gather_v(torch.zeros(1, 1), [1] * (world.size + 1))
    with pytest.raises(ValueError, match=r"x has 2 rows, counts\["):
        world.all_gather_v(torch.zeros(2, 1), [1] * world.size)
    with pytest.raises(ValueError, match="send_counts add up to"):
        world.all_to_all_v(torch.zeros(2, 1), [0] * world.size, [0] * world.size)
    with pytest.raises(ValueError, match="src = 9"):
        world.broadcast(torch.zeros(1), 9)


def check_byte_prediction(cp: Group) -> None:
    """Every stream of a step moves exactly what partition says."""
    chunks = [Chunk(126, 700), Chunk(3, 40), Chunk(256, 1000)]
    tails = [[256, 512], [], [1000 // 128 * 128]]
    segments = cut(chunks, cp.size, 64)
    streams = [
        (window_wants(chunks, segments, 128, tails), 64, torch.bfloat16),
        (group_wants(chunks, segments, 4, True, tails), 32, torch.float32),
        (group_wants(chunks, segments, 128, False, tails), 16, torch.float32),
    ]
    for (own, shared), width, dtype in streams:
        for everything in (False, True):
            plan: RowPlan = plan_rows(
                chunks, segments, rank_wants=own, shared_wants=shared, publish_all=everything
            )
            request, position = (torch.from_numpy(a) for a in local_tokens(segments[cp.rank]))
            ids = (position + 10_000 * request).to(dtype).view(-1, 1).expand(-1, width)
            cp.stats.reset()
            cp.all_gather_v(ids[torch.from_numpy(plan.local_rows(cp.rank))], plan.counts)
            row_bytes = width * dtype.itemsize
            assert cp.stats.sent == plan.sent_rows(cp.rank) * row_bytes > 0
            assert cp.stats.received == plan.received_rows(cp.rank) * row_bytes
    entries = entry_plan(chunks, segments, 4)
    cp.stats.reset()
    cp.all_gather_v(torch.zeros(entries.counts[cp.rank], 584, dtype=torch.uint8), entries.counts)
    assert cp.stats.sent == entries.sent_rows(cp.rank) * 584
    cp.stats.reset()
    cp.all_gather_v(torch.zeros(0, 584), [0] * cp.size)
    assert (cp.stats.calls, cp.stats.sent) == (0, 0)  # nothing to say, nothing called


def check_mesh(rank: int, size: int, cp: int, tp: int) -> ParallelMesh:
    mesh = build_mesh(ParallelConfig(cp=cp, tp=tp), rank)
    here = torch.tensor([rank])
    cp_rank, tp_rank = rank // tp, rank % tp
    assert mesh.cp.all_gather(here).tolist() == [c * tp + tp_rank for c in range(cp)]
    assert mesh.tp.all_gather(here).tolist() == [cp_rank * tp + t for t in range(tp)]
    assert mesh.world.all_gather(here).tolist() == list(range(size))
    assert (mesh.cp.rank, mesh.tp.rank, mesh.world.rank) == (cp_rank, tp_rank, rank)
    # Each head is added exactly once by whichever group decode sums over.
    for heads, groups in ((8, 4), (12 * tp, 3 * tp), (8, 2 * tp), (4 * tp, tp)):
        view = mesh.decode_view(heads, groups)
        assert view.over_world == (heads % size == 0 and groups % size == 0)
        for count, span in ((heads, view.heads), (groups, view.groups)):
            first = tp_rank * (count // tp)
            assert 0 <= span[0] < span[1] <= count // tp
            held = torch.zeros(count)
            held[first + span[0] : first + span[1]] = 1
            assert view.group.all_reduce(held).tolist() == [1.0] * count
        assert view.heads[0] * groups == view.groups[0] * heads
    return mesh


def all_checks(rank: int, size: int) -> dict[str, Any]:
    meshes = [(size, 1), (1, size), *([(2, 2)] if size == 4 else [])]
    for cp, tp in meshes:
        mesh = check_mesh(rank, size, cp, tp)
        for group in (mesh.world, mesh.cp, mesh.tp):
            check_gathers(group)
            check_reductions(group)
            check_all_to_all(group)
            check_broadcast(group)
            if group.size > 1:
                check_byte_prediction(group)
    check_errors(mesh.world)
    with pytest.raises(ValueError, match=f"needs {size + 1} ranks, torch.distributed has {size}"):
        build_mesh(ParallelConfig(cp=size + 1), rank)
    with pytest.raises(ValueError, match=f"rank {size}, allowed"):
        build_mesh(ParallelConfig(cp=size), size)
    return {"rank": rank, "sum": mesh.world.all_reduce(torch.ones(1)).item()}


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_and_meshes(size: int) -> None:
    results = run_ranks(all_checks, size)
    assert results == [{"rank": r, "sum": float(size)} for r in range(size)]


def test_one_rank_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    mesh = ParallelMesh.single()
    for group in (mesh.world, mesh.cp, mesh.tp):
        check_gathers(group)
        check_reductions(group)
        check_all_to_all(group)
        check_broadcast(group)
        x = torch.ones(3)
        assert group.all_gather(x) is x
        assert group.all_reduce(x) is x
        assert group.stats.calls == 0
    assert build_mesh(ParallelConfig(), 0).coord.world == 1
    with pytest.raises(ValueError, match="needs a process group"):
        Group(None, 2, 0)
    with pytest.raises(ValueError, match="needs 2 ranks"):
        build_mesh(ParallelConfig(tp=2), 0)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_decode_slice_lies_inside_the_tp_slice(cp: int) -> None:
    tp, heads, groups = 2, 16, 8
    taken = []
    for rank in range(cp * tp):
        coord = MeshCoord(cp=cp, tp=tp, rank=rank)
        one = Group(None, 1, 0)
        view = ParallelMesh(coord=coord, cp=one, tp=one, world=one).decode_view(heads, groups)
        first = coord.tp_rank * (heads // tp) + view.heads[0]
        assert first == coord.decode_slice * heads // (cp * tp)
        taken.append(first)
    assert sorted(taken) == [i * heads // (cp * tp) for i in range(cp * tp)]


def test_heads_that_do_not_divide_are_refused_with_numbers() -> None:
    one = Group(None, 1, 0)
    mesh = ParallelMesh(coord=MeshCoord(cp=1, tp=3, rank=0), cp=one, tp=one, world=one)
    with pytest.raises(ValueError, match=r"64 attention heads and 9 output groups .* tp = 3"):
        mesh.decode_view(64, 9)


# --- the helper itself ---------------------------------------------------------------------------


def fails_on_one(rank: int, size: int) -> None:
    if rank == 1:
        raise KeyError("the first failure")
    dist.barrier()


def dies_on_one(rank: int, size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hangs_on_one(rank: int, size: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.parametrize(
    ("fn", "timeout", "message"),
    [
        (fails_on_one, 60, "rank 1 failed first:(.|\n)*the first failure"),
        (dies_on_one, 60, "1: 7"),
        (hangs_on_one, 4, r"ranks \[.*1\] did not finish within 4 s"),
    ],
)
def test_run_ranks_reports_the_rank_that_is_to_blame(fn: Any, timeout: float, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(fn, 2, timeout=timeout)
    assert time.monotonic() - started < timeout + 10
