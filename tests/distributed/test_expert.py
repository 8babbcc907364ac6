"""Expert parallelism on every mesh against a plain loop; ``ordered`` bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.parallel import expert
from model.parallel.collectives import Group
from model.parallel.config import MeshCoord, ParallelConfig
from model.parallel.expert import ExpertParallel
from model.parallel.mesh import ParallelMesh, build_mesh
from tests.helpers.ranks import run_ranks

EXPERTS, TOPK, DIM = 8, 3, 16
ROUTE_BYTES = 16 + 32  # 3 weights and 3 ids, each padded to whole 16 bytes
MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (4, 1), (1, 4)]}

# Tokens of each cp rank: even, uneven, empty ranks, fewer than the tp ranks that share them.
LOADS = [[6, 6, 6, 6], [13, 1, 0, 5], [0, 0, 0, 9], [1, 0, 0, 0], [0, 0, 0, 0]]


class Experts:
    """Row-wise stand-ins for the expert network: a row's result never depends on its neighbours."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(11)
        self.scale = torch.randn(EXPERTS, DIM, generator=g)
        self.shift = torch.randn(EXPERTS, DIM, generator=g)

    def one(self, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.sin(x.float() * self.scale[expert]) + self.shift[expert]
        return (wide * weight[:, None]).to(x.dtype)

    def runner(self, first: int, local: int) -> object:
        def run(rows: Tensor, offsets: Tensor, row_weight: Tensor) -> Tensor:
            assert offsets.shape == (local + 1,)
            assert offsets.dtype == torch.int64
            assert row_weight.dtype == torch.float32
            assert rows.shape[0] == row_weight.shape[0] >= int(offsets[-1])
            out = torch.full_like(rows, float("nan"))
            for e in range(local):
                part = slice(int(offsets[e]), int(offsets[e + 1]))
                out[part] = self.one(first + e, rows[part], row_weight[part])
            return out

        return run


def shared_expert(x: Tensor) -> Tensor:
    return (torch.cos(x.float()) * 0.7).to(x.dtype)


def tokens(load: list[int], case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of the step. ``one``: every token takes the same experts, others stay empty."""
    g = torch.Generator().manual_seed(sum(load) + 1)
    count = sum(load)
    x = torch.randn(count, DIM, generator=g).to(dtype)
    if case == "one":
        ids = torch.tensor([[1, 2, 7]]).expand(count, TOPK).contiguous()
    else:
        ids = torch.rand(count, EXPERTS, generator=g).argsort(1)[:, :TOPK].sort(1).values
    return x, ids, torch.rand(count, TOPK, generator=g) + 0.1


def reference(x: Tensor, ids: Tensor, weights: Tensor, shared: bool) -> Tensor:
    """A plain loop over the tokens, experts ascending, the shared expert last, in fp32."""
    experts = Experts()
    out = torch.zeros(x.shape, dtype=torch.float32)
    for t in range(x.shape[0]):
        for k in range(ids.shape[1]):
            row = experts.one(int(ids[t, k]), x[t : t + 1], weights[t : t + 1, k])
            out[t] += row[0].float()
        if shared:
            out[t] += shared_expert(x[t : t + 1])[0].float()
    return out


def check(mesh: ParallelMesh, load: list[int], case: str, dtype: torch.dtype, shared: bool) -> None:
    x, ids, weights = tokens(load, case, dtype)
    expected = reference(x, ids, weights, shared)
    cp = mesh.cp
    # The loads of four cp ranks are dealt to those that exist.
    own_load = [sum(load[r :: cp.size]) for r in range(cp.size)]
    first = sum(own_load[: cp.rank])
    own = slice(first, first + own_load[cp.rank])
    for combine, gather_from in (("ordered", 0.0), ("fast", 0.0), ("fast", 2.0)):
        parallel = ExpertParallel(mesh, EXPERTS, combine)  # type: ignore[arg-type]
        parallel.gather_from = gather_from
        run = Experts().runner(parallel.first_expert, parallel.num_local)
        for replicated in (True, False):
            mine = slice(0, x.shape[0]) if replicated else own
            seen: list[int] = []

            def shared_rows(
                start: int, stop: int, seen: list[int] = seen, x: Tensor = x[mine]
            ) -> Tensor:
                seen.append(stop - start)
                return shared_expert(x[start:stop])

            def part_of_shared(start: int, stop: int, x: Tensor = x) -> Tensor | None:
                whole, world = shared_expert(x[start:stop]).float(), mesh.world
                if world.rank == 0:  # a rank may have nothing to add
                    return None
                return whole / (world.size - 1)

            out = parallel.forward(
                x[mine],
                ids[mine],
                weights[mine],
                run,  # type: ignore[arg-type]
                counts=None if replicated else own_load,
                shared=shared_rows if shared else None,
                dtype=torch.float32,
            )
            label = (cp.size, mesh.tp.size, load, case, dtype, combine, gather_from, replicated)
            if shared and replicated and parallel.adds_up:
                # Parts of the shared expert that the ranks give add up to the same.
                parts = parallel.forward(
                    x,
                    ids,
                    weights,
                    run,  # type: ignore[arg-type]
                    counts=None,
                    parts=True,
                    shared=part_of_shared,
                    dtype=dtype,
                )
                assert parts.dtype == torch.float32, label
                torch.testing.assert_close(parts, out, rtol=0.02, atol=0.02, msg=str(label))
            if shared and not replicated and mesh.world.size > 1:  # an even share of the tp ranks
                assert len(seen) == 1, label
                assert abs(seen[0] - own_load[cp.rank] / mesh.tp.size) < 1, label
            assert out.dtype == torch.float32, label
            assert out.shape == expected[mine].shape, label
            if combine == "ordered":
                assert torch.equal(out, expected[mine]), label
            else:
                tolerance = 1e-5 if dtype == torch.float32 else 0.04
                torch.testing.assert_close(
                    out, expected[mine], rtol=tolerance, atol=tolerance, msg=str(label)
                )


def check_mesh(rank: int, cp: int, tp: int) -> None:
    mesh = build_mesh(ParallelConfig(cp=cp, tp=tp), rank)
    for load in LOADS:
        for case in ("random", "one"):
            for dtype in (torch.float32, torch.bfloat16):
                check(mesh, load, case, dtype, shared=case == "random")


def check_traffic(rank: int, size: int) -> None:
    """A row travels once to each rank that owns one of its experts; ``fast`` returns one row each.

    Where all rows go to all ranks, they do so once, and one row of sums comes back from each.
    """
    x, ids, weights = tokens([6, 6, 6, 6][:size], "random", torch.bfloat16)
    x, ids, weights = (part.tensor_split(size)[rank] for part in (x, ids, weights))
    visits = sum(len({int(e) * size // EXPERTS for e in row} - {rank}) for row in ids)
    slots = sum(int(e) * size // EXPERTS != rank for row in ids for e in row)
    for combine, returned in (("fast", visits), ("ordered", slots)):
        mesh = build_mesh(ParallelConfig(cp=size), rank)
        parallel = ExpertParallel(mesh, EXPERTS, combine)  # type: ignore[arg-type]
        parallel.gather_from = 2.0
        run = Experts().runner(parallel.first_expert, parallel.num_local)

        def forward(parallel: ExpertParallel = parallel, run: object = run) -> None:
            parallel.forward(
                x,
                ids,
                weights,
                run,  # type: ignore[arg-type]
                counts=[x.shape[0]] * size,
                shared=None,
                dtype=torch.float32,
            )

        forward()
        row_bytes = DIM * 2
        dispatch = (size - 1) * 16 + visits * (row_bytes + ROUTE_BYTES)
        answers = mesh.world.stats.received - sum_dispatched(mesh, ids)
        assert mesh.world.stats.sent - dispatch == sent_answers(mesh, combine, ids) * row_bytes
        assert answers == returned * row_bytes
        if combine == "fast":
            parallel.gather_from = 0.0
            mesh.world.stats.reset()
            forward()
            travelled = (size - 1) * x.shape[0] * (row_bytes + ROUTE_BYTES + row_bytes)
            assert (mesh.world.stats.sent, mesh.world.stats.received) == (travelled, travelled)


def other_ranks(mesh: ParallelMesh, ids: Tensor) -> list[Tensor]:
    """The ids of every other rank; counted in the cp group, not in the world's."""
    return [part for r, part in enumerate(mesh.cp.all_gather(ids[None])) if r != mesh.cp.rank]


def sum_dispatched(mesh: ParallelMesh, ids: Tensor) -> int:
    """Bytes of counts, rows and routes that reach this rank."""
    size, me = mesh.world.size, mesh.world.rank
    others = other_ranks(mesh, ids)
    visits = sum(any(int(e) * size // EXPERTS == me for e in row) for p in others for row in p)
    return (size - 1) * 16 + visits * (DIM * 2 + ROUTE_BYTES)


def sent_answers(mesh: ParallelMesh, combine: str, ids: Tensor) -> int:
    size, me = mesh.world.size, mesh.world.rank
    others = other_ranks(mesh, ids)
    hits = [[int(e) * size // EXPERTS == me for e in row] for p in others for row in p]
    return sum(map(any, hits)) if combine == "fast" else sum(map(sum, hits))


def all_meshes(rank: int, size: int) -> str:
    for cp, tp in MESHES[size]:
        check_mesh(rank, cp, tp)
    whole, expert._GATHERED_ROWS = expert._GATHERED_ROWS, 3
    check_mesh(rank, size, 1)  # all rows of all ranks, a few at once
    expert._GATHERED_ROWS = whole
    check_traffic(rank, size)
    return "ok"


@pytest.mark.parametrize("size", [2, 4])
def test_every_mesh_agrees_with_a_plain_loop(size: int) -> None:
    assert run_ranks(all_meshes, size) == ["ok"] * size


def test_one_rank_agrees_with_a_plain_loop() -> None:
    check_mesh(0, 1, 1)


@pytest.mark.parametrize(("size", "everyone"), [(2, True), (8, True), (10, False)])
def test_six_experts_a_token_gather_up_to_eight_ranks(
    monkeypatch: pytest.MonkeyPatch, size: int, everyone: bool
) -> None:
    """A rank of 8 needs 55 % of all rows, a rank of 10 47 %."""
    groups = {name: Group(None, 1, 0) for name in ("cp", "tp", "world")}
    groups["cp"].size = groups["world"].size = size
    mesh = ParallelMesh(coord=MeshCoord(cp=size, tp=1, rank=0), **groups)
    parallel = ExpertParallel(mesh, 8 * size, "fast")
    taken: list[str] = []
    for road in ("_gathered", "_sharded"):
        monkeypatch.setattr(parallel, road, lambda *_, road=road: taken.append(road))
    rows = torch.zeros(3, DIM)
    ids, weights = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6)

    def forward(counts: list[int]) -> None:
        parallel.forward(
            rows,
            ids,
            weights,
            Experts().runner(0, 8),  # type: ignore[arg-type]
            counts=counts,
            shared=None,
            dtype=torch.float32,
        )

    forward([3] * size)
    assert taken == ["_gathered" if everyone else "_sharded"]
    for wrong in ([3] * (size - 1), [4] + [3] * (size - 1)):
        with pytest.raises(ValueError, match="counts"):
            forward(wrong)


def test_row_numbers_outlive_larger_steps() -> None:
    """A captured decode step keeps the address of the numbers it read; a long prefill needs more."""
    parallel = ExpertParallel(ParallelMesh.single(), EXPERTS, "fast")
    here = torch.zeros(0)
    few = parallel._iota(2, here)
    address = few.data_ptr()
    del few
    many = parallel._iota(5000, here)
    assert torch.equal(many, torch.arange(5000))
    held = [numbers.data_ptr() for numbers in parallel._numbers]
    assert address in held
    assert parallel._iota(3, here).data_ptr() == many.data_ptr()


def test_bad_inputs_are_refused() -> None:
    mesh = ParallelMesh.single()
    with pytest.raises(ValueError, match="combine = 'quick'"):
        ExpertParallel(mesh, 8, "quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 experts"):
        ExpertParallel(mesh, 0, "fast")
    parallel = ExpertParallel(mesh, EXPERTS, "fast")
    run = Experts().runner(0, EXPERTS)
    ids, weights = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"weights \(2, 2\)"):
        parallel.forward(
            torch.zeros(2, DIM),
            ids,
            weights,
            run,  # type: ignore[arg-type]
            counts=None,
            shared=None,
            dtype=torch.float32,
        )
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="need a sum"):
        parallel.forward(
            torch.zeros(2, DIM),
            ids,
            torch.zeros(2, 3),
            run,  # type: ignore[arg-type]
            counts=None,
            parts=True,
            shared=None,
            dtype=torch.float32,
        )
