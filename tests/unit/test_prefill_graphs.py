"""Prefill steps as graphs: which look alike on every rank, which are captured, what is copied."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import CacheDtype
from model.cache_spec import CacheSpec
from model.checkpoint.source import load_config
from model.forward_batch import PrefillBatch
from model.parallel.config import MeshCoord, ParallelConfig
from tests.helpers.parity_runs import shape_path
from tests.helpers.replay import FakeGraph, FakeRecorder
from worker.batch_layout import layout_of, place_in, tensors_of
from worker.kv_cache import KVCachePool
from worker.prefill_builder import PrefillBuilder
from worker.prefill_graph import CaptureChoice, PrefillGraphs, prefill_obstacle
from worker.prefill_step import PrefillStep
from worker.protocol import PrefillSlice, SamplingParams, SlotInit, TailSave
from worker.slots import SlotTable

BLOCK, SLOTS, COLUMNS = 128, 4, 24
MOST = 300  # columns of a slot's table
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Piece:
    """One request's share of a step: tokens from ``start`` on, tails saved ``tails`` after it."""

    start: int
    length: int
    tails: tuple[int, ...] = ()


class Ranks:
    """Builders of all ranks of one mesh."""

    def __init__(self, cp: int, *, min_tokens: int = 0, gather: str = "compressed", mtp: int = 0):
        parallel = ParallelConfig(cp=cp, cp_min_tokens=min_tokens, cp_gather=gather)  # type: ignore[arg-type]
        spec = CacheSpec(
            config=load_config(path="", shape=shape_path()),
            dtype=CacheDtype.FP32,
            block_size=BLOCK,
            max_drafts=mtp,
            with_mtp=mtp > 0,
            parallel=parallel,
        )
        self.pool = KVCachePool(
            spec,
            num_blocks=4,
            num_slots=SLOTS,
            num_tails=8,
            device=CPU,
            streams_dtype=torch.float32,
        )
        self.slots = SlotTable(SLOTS, MOST, cp=cp, cp_rank=0, sharded=False)
        self.builders = [
            PrefillBuilder(
                spec, parallel, MeshCoord(cp=cp, tp=1, rank=r), self.pool, self.slots, CPU
            )
            for r in range(cp)
        ]
        self.draw = np.random.default_rng(0)

    def steps(self, pieces: tuple[Piece, ...], columns: int = COLUMNS) -> list[PrefillStep]:
        """The step of every rank; slots, blocks and tokens are others each time."""
        order = self.draw.permutation(SLOTS).tolist()[: len(pieces)]
        tail = itertools.count()
        slices = []
        for slot, piece in zip(order, pieces, strict=True):
            self.slots.open(
                SlotInit(
                    request_id=slot,
                    slot=slot,
                    sampling=SamplingParams(),
                    num_prompt_tokens=piece.start + piece.length,
                    start=piece.start,
                    block_ids=self.draw.permutation(columns).tolist(),
                )
            )
            slices.append(
                PrefillSlice(
                    request_id=slot,
                    slot=slot,
                    start=piece.start,
                    token_ids=self.draw.integers(128, size=piece.length).tolist(),
                    save_tails=[
                        TailSave(position=piece.start + t, tail=next(tail)) for t in piece.tails
                    ],
                )
            )
        return [builder.build(slices) for builder in self.builders]


def one_key(steps: list[PrefillStep]) -> Hashable:
    (key,) = {step.key for step in steps}  # every rank comes to the same
    return key


def random_pieces(draw: np.random.Generator) -> tuple[Piece, ...]:
    """Chunks at starts and of lengths that look alike now and then."""
    pieces = []
    for _ in range(draw.integers(1, 4)):
        start = int(
            draw.choice([0, 0, 3, 4, 127, 128, 256]) + 128 * draw.choice([0, 0, 1, 3, 5, 9])
        )
        length = int(draw.choice([1, 5, 128, 130, 512, 700]))
        tails = tuple(
            t for t in (128, 256) if t <= length and start % 128 == 0 and draw.random() < 0.3
        )
        pieces.append(Piece(start, length, tails))
    return tuple(pieces)


@pytest.mark.parametrize("gather", ["compressed", "kv_bf16"])
@pytest.mark.parametrize(("cp", "min_tokens"), [(1, 0), (2, 0), (4, 0), (4, 256), (8, 256)])
def test_steps_of_one_key_have_one_layout_on_every_rank(
    cp: int, min_tokens: int, gather: str
) -> None:
    ranks, draw = Ranks(cp, min_tokens=min_tokens, gather=gather), np.random.default_rng(cp)
    found: dict[Hashable, list[Hashable]] = {}
    drawn: dict[Hashable, set[tuple[Piece, ...]]] = {}
    for _ in range(150 // max(1, cp // 2)):
        pieces = random_pieces(draw)
        for shift in (0, 128, 384):
            moved = tuple(replace(p, start=p.start + shift) for p in pieces)
            steps = ranks.steps(moved)
            layouts = [layout_of(step.batch) for step in steps]
            assert found.setdefault(one_key(steps), layouts) == layouts, moved
            drawn.setdefault(one_key(steps), set()).add(moved)
    assert sum(len(same) > 1 for same in drawn.values()) > 10  # the key joins what is alike


BASE = (Piece(1024, 700, (128,)),)
OTHERS = {
    "length": (Piece(1024, 699, (128,)),),
    "start inside a group": (Piece(1025, 699, (127,)),),
    "beginning": (Piece(0, 700, (128,)),),
    "window reaches the beginning": (Piece(128, 700, (128,)),),
    "no tail": (Piece(1024, 700),),
    "another tail": (Piece(1024, 700, (256,)),),
    "company": (Piece(1024, 700, (128,)), Piece(1024, 5)),
}


@pytest.mark.parametrize("cp", [1, 4])
def test_what_differs_has_a_key_of_its_own(cp: int) -> None:
    ranks = Ranks(cp)
    keys = [one_key(ranks.steps(pieces)) for pieces in (BASE, *OTHERS.values())]
    keys.append(one_key(ranks.steps(BASE, columns=COLUMNS + 1)))
    assert len(set(keys)) == len(keys)
    assert one_key(ranks.steps((Piece(2048, 700, (128,)),))) == keys[0]


def test_other_counts_have_other_keys() -> None:
    """Who gets a chunk that is not cut depends on where the others lie: the same lengths, other counts."""
    ranks = Ranks(4, min_tokens=512)
    first = ranks.steps((Piece(640, 500), Piece(2048, 100), Piece(640, 101)))
    second = ranks.steps((Piece(640, 500), Piece(640, 100), Piece(2048, 101)))
    assert first[0].batch.counts == (500, 100, 101, 0)
    assert second[0].batch.counts == (500, 101, 100, 0)
    assert one_key(first) != one_key(second)


def test_full_chunks_of_a_long_prompt_share_a_key() -> None:
    ranks = Ranks(4)
    for builder in ranks.builders:
        builder.pad_tables = True
    found = [one_key(ranks.steps((Piece(640 * i, 640),), columns=5 * i + 5)) for i in range(58)]
    assert len(set(found[1:51])) == 1  # up to 256 columns
    assert len(set(found[51:])) == 1  # up to 512
    assert len(set(found)) == 3
    (step, *_) = ranks.steps((Piece(0, 640),), columns=17)
    assert step.batch.block_table.shape == (1, 256)
    assert (step.batch.block_table[:, 17:] == -1).all()
    assert (step.batch.main_block_table[:, 17:] == -1).all()
    (step, *_) = ranks.steps((Piece(0, 640), Piece(128, 5)), columns=17)
    assert step.batch.block_table.shape == (2, 17)  # such a step hardly comes back


def test_all_ranks_choose_alike() -> None:
    ranks, draw = Ranks(4, min_tokens=256), np.random.default_rng(1)
    shapes = [random_pieces(draw) for _ in range(7)]
    choices = [CaptureChoice(kept=2, idle=3) for _ in ranks.builders]
    seen = set()
    for _ in range(120):
        steps = ranks.steps(shapes[int(draw.integers(len(shapes)))])
        made = [choice.choose(step.key) for choice, step in zip(choices, steps, strict=True)]
        assert len(set(made)) == 1
        seen.add(made[0].action)
    assert seen == {"launch", "capture", "replay"}


# --- when to capture -----------------------------------------------------------------------------


def actions(choice: CaptureChoice, keys: str) -> str:
    return "".join(choice.choose(key).action[0] for key in keys)


def test_the_second_step_of_a_shape_is_captured() -> None:
    assert actions(CaptureChoice(), "aabacbbc") == "lclrlcrc"


def test_more_shapes_than_room_in_turn_cost_no_captures() -> None:
    choice = CaptureChoice(kept=2, idle=10)
    assert actions(choice, "abcabcabcabc") == "lll" + "ccl" + "rrl" * 2


def test_a_graph_that_idles_makes_room() -> None:
    choice = CaptureChoice(kept=2, idle=3)
    assert actions(choice, "aabb") == "lclc"
    assert actions(choice, "bcb") == "rlr"
    last = choice.choose("c")
    assert (last.action, last.evicted) == ("capture", "a")
    assert actions(choice, "aba") == "lrl"  # seen anew, but b and c are in use


def test_shapes_without_a_graph_are_forgotten_in_time() -> None:
    choice = CaptureChoice()
    choice.choose("old")
    for number in range(300):
        choice.choose(number)
    assert choice.choose("old").action == "launch"


# --- running them --------------------------------------------------------------------------------


def weighed(batch: PrefillBatch) -> Tensor:
    """A result that depends on every value of every tensor of the batch."""
    total = sum(
        i * (t.double() * torch.arange(1, t.numel() + 1).view(t.shape)).sum()
        for i, t in enumerate(tensors_of(batch), 1)
    )
    return total * torch.ones(batch.num_rows + 1, 2, 3, dtype=torch.float64)


def like_steps(ranks: Ranks) -> Iterator[PrefillStep]:
    for start in itertools.count(512, 128):
        yield ranks.steps((Piece(start, 300, (128,)),))[-1]


@pytest.mark.parametrize("cp", [1, 4])
def test_replays_read_the_new_step_and_results_are_the_callers(cp: int) -> None:
    recorder, results = FakeRecorder(torch.float64), []
    graphs = PrefillGraphs(weighed, recorder)
    for step in itertools.islice(like_steps(Ranks(cp)), 5):
        before = step.packed.clone()
        results.append((graphs.run(step), weighed(step.batch)))
        assert torch.equal(before, step.packed)
    assert (recorder.captures, graphs.num_replays) == (1, 3)
    assert all(torch.equal(found, want) for found, want in results)  # later replays changed none
    assert len({float(found[0, 0, 0]) for found, _ in results}) == 5
    graphs.close()
    assert recorder.events == ["capture", "settle", "reset"]


def test_a_captured_step_reads_a_buffer_of_its_own() -> None:
    step = next(like_steps(Ranks(2)))
    own = step.packed.clone()
    copy = place_in(own, step.batch)
    pairs = list(zip(tensors_of(step.batch), tensors_of(copy), strict=True))
    assert len(pairs) == 39  # 7, 10 of the window, 11 of each ratio
    for here, there in pairs:
        assert torch.equal(here, there)
        assert here.storage_offset() == there.storage_offset()
        assert here.data_ptr() % 16 == 0
    own.zero_()
    assert not any(there.any() for _, there in pairs)  # all of them lie in it
    assert layout_of(copy) == layout_of(step.batch)
    assert layout_of(replace(step.batch, counts=(1, 2))) != layout_of(step.batch)
    with pytest.raises(TypeError, match="str, which has no layout"):
        layout_of("x")


def test_a_dropped_graph_is_waited_for() -> None:
    recorder, steps = FakeRecorder(torch.float64), like_steps(Ranks(1))
    graphs = PrefillGraphs(weighed, recorder, CaptureChoice(kept=1, idle=0))
    for key in ("a", "a", "b", "b"):
        graphs.run(replace(next(steps), key=key))
    assert recorder.events == ["capture", "settle", "reset", "capture"]


def test_another_layout_under_a_known_key_is_refused() -> None:
    ranks = Ranks(1)
    (short,), (long,) = ranks.steps((Piece(0, 5),)), ranks.steps((Piece(0, 6),))
    graphs = PrefillGraphs(weighed, FakeRecorder(torch.float64))
    for _ in range(2):
        graphs.run(short)
    with pytest.raises(RuntimeError, match="6 rows has the key of another layout"):
        graphs.run(replace(long, key=short.key))


class NoMemory(FakeRecorder):
    """Captures nothing; torch's context manager may fail in turn while it leaves."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[FakeGraph, Tensor]:
        try:
            raise torch.OutOfMemoryError("tried to allocate")
        finally:
            if self.events:
                raise RuntimeError("capture was invalidated")


@pytest.mark.parametrize("events", [[], ["leave badly"]])
def test_a_capture_without_memory_names_the_ways_out(events: list[str]) -> None:
    graphs = PrefillGraphs(weighed, NoMemory(torch.float64, events=events))
    steps = like_steps(Ranks(1))
    graphs.run(next(steps))
    with pytest.raises(RuntimeError, match="prefill_graphs: false, or lower kv_cache"):
        graphs.run(next(steps))


def test_only_beside_graphs_a_launched_step_blames_them() -> None:
    def forward(batch: PrefillBatch) -> Tensor:
        if batch.num_rows == 6:
            raise torch.OutOfMemoryError("tried to allocate")
        return weighed(batch)

    ranks = Ranks(1)
    (short,), (long,) = ranks.steps((Piece(0, 5),)), ranks.steps((Piece(0, 6),))
    graphs = PrefillGraphs(forward, FakeRecorder(torch.float64))
    with pytest.raises(torch.OutOfMemoryError, match="tried"):
        graphs.run(long)
    for _ in range(2):
        graphs.run(short)
    with pytest.raises(RuntimeError, match="prefill_graphs: false"):
        graphs.run(replace(long, key="another"))


def test_what_keeps_prefill_out_of_graphs() -> None:
    def obstacle(parallel: ParallelConfig, decode: str = "", waits: bool = False) -> str:
        return prefill_obstacle(parallel, decode_obstacle=decode, waits_for_host=waits)

    assert not obstacle(ParallelConfig(cp=4))
    assert obstacle(ParallelConfig(cp=4), decode="the device is cpu") == "the device is cpu"
    assert "kv_shard" in obstacle(ParallelConfig(cp=4, kv_shard="cp"))
    assert "read back" in obstacle(ParallelConfig(cp=4), waits=True)
