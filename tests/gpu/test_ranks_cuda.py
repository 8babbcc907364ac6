"""Several GPUs over NCCL: golden logits, and decode graphs with and without peer memory."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.parallel.config import MeshCoord, ParallelConfig
from tests.helpers.forced_plans import forced_plans
from tests.helpers.small_flash import VOCAB, small_flash
from worker.config import KVCacheConfig, ModelSource, SchedulerConfig, WorkerConfig
from worker.protocol import PrefillSlice, SamplingParams, SlotInit, StepPlan
from worker.rendezvous import serve_store
from worker.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices"),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "g_realdims"
BLOCK = 256


def run_rank(
    rank: int,
    config: WorkerConfig,
    init_method: str,
    steps: list[StepPlan],
    answer: SimpleQueue[tuple[bytes, int]],
) -> None:
    parallel = config.parallel
    coord = MeshCoord(cp=parallel.cp, tp=parallel.tp, rank=rank)
    worker = Worker(config, coord, device_index=rank)
    worker.init_distributed(init_method)
    worker.load()
    worker.init_cache()
    worker.warm_up()
    rehearsed = prefill_replays(worker)
    outputs = [worker.execute(plan).outputs for plan in steps]
    if rank == 0:
        replays = prefill_replays(worker) - rehearsed
        answer.put((b"".join(step[0].logits for step in outputs), replays))
    worker.close()


def prefill_replays(worker: Worker) -> int:
    runner = worker._runner
    assert runner is not None
    return runner.prefill_graphs.num_replays if runner.prefill_graphs is not None else 0


def world(config: WorkerConfig, ids: list[int], prefilled: int) -> np.ndarray:
    """Logits [tokens, vocabulary] of a prompt and given tokens behind it."""
    blocks = list(range(-(-(len(ids) + 8) // BLOCK)))
    return run_world(config, forced_plans(ids, prefilled, blocks))[0]


def run_world(config: WorkerConfig, steps: list[StepPlan]) -> tuple[np.ndarray, int]:
    """Logits [rows, vocabulary] of all steps, one process per GPU; prefill steps that were replayed."""
    prefilled = sum(len(part.token_ids) for step in steps for part in step.prefill)
    tokens = prefilled + sum(len(row.token_ids) for step in steps for row in step.decode)
    store, init_method = serve_store("127.0.0.1", 120)
    context = multiprocessing.get_context("spawn")
    answer: SimpleQueue[tuple[bytes, int]] = context.SimpleQueue()
    ranks = [
        context.Process(target=run_rank, args=(rank, config, init_method, steps, answer))
        for rank in range(config.parallel.world)
    ]
    for process in ranks:
        process.start()
    while answer.empty():
        assert all(p.exitcode in (None, 0) for p in ranks), [p.exitcode for p in ranks]
        ranks[0].join(0.2)
    rows, replays = answer.get()
    logits = np.frombuffer(rows, np.float32).reshape(tokens, -1)
    for process in ranks:
        process.join(60)
    assert [p.exitcode for p in ranks] == [0] * len(ranks)
    del store  # it must outlive the ranks
    return logits, replays


def setup(source: ModelSource, cp: int, tp: int) -> WorkerConfig:
    return WorkerConfig(
        model=source,
        device="cuda",
        parallel=ParallelConfig(cp=cp, tp=tp, cp_min_tokens=0),
        kv_cache=KVCacheConfig(num_blocks=32, block_size=BLOCK),
        scheduler=SchedulerConfig(max_num_seqs=2, prefix_cache=False),
    )


# g_realdims has two output groups: tp 4 does not divide them.
@pytest.mark.parametrize(("cp", "tp"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("numerics", ["fp32", "release"])
def test_golden(cp: int, tp: int, numerics: str) -> None:
    ids: list[int] = load_file(GOLDEN / "golden.safetensors")["input_ids"].tolist()
    source = ModelSource(path=str(GOLDEN), numerics=numerics, max_model_len=1024)  # type: ignore[arg-type]
    found = world(setup(source, cp, tp), ids, len(ids) - 9)
    if numerics == "fp32":
        want = load_file(GOLDEN / "golden.safetensors")["logits"].numpy()
        assert np.abs(found - want).max() <= 2e-4
        return
    want = load_file(GOLDEN / "golden_release.safetensors")["logits_release"].numpy()
    simulated = json.loads((GOLDEN / "golden.json").read_text())["sim_act+kv+idx"]
    assert np.sqrt(np.square(found - want).mean()) <= 1.3 * simulated["rms"] + 0.1


def test_decode_graphs_on_four_ranks(tmp_path: Path) -> None:
    """A long prompt after the captures, then replayed steps: the bits of launched ones.

    The prompt is longer than any rehearsed one, so everything that grows with a step has grown since.
    """
    shape = small_flash(tmp_path, (0, 4, 128, 4))
    source = ModelSource(shape=shape, load_format="random", max_model_len=4096)
    ids = np.random.default_rng(1).integers(VOCAB, size=3000).tolist()
    config = setup(source, 4, 1)
    replayed = world(config, ids, 2960)
    assert np.isfinite(replayed).all()
    assert np.array_equal(replayed, world(replace(config, cuda_graphs=False), ids, 2960))
    nccl = replace(config, parallel=replace(config.parallel, peer_memory=False))
    other = world(nccl, ids, 2960)  # another order of summation, nothing else
    assert np.sqrt(np.square(other - replayed).mean()) < 0.1 * np.sqrt(np.square(replayed).mean())


def chunk_plans(prompts: int, chunks: int, size: int) -> list[StepPlan]:
    """Prompts in chunks of one size, each in a slot and blocks of its own; every row's logits."""
    draw = np.random.default_rng(2)
    found: list[StepPlan] = []
    for number in range(prompts):
        ids = draw.integers(VOCAB, size=size * chunks).tolist()
        init = SlotInit(
            request_id=number, slot=number, sampling=SamplingParams(), num_prompt_tokens=len(ids)
        )
        per_chunk = size // BLOCK
        first = number * chunks * per_chunk
        for i in range(chunks):
            part = PrefillSlice(
                request_id=number,
                slot=number,
                start=i * size,
                token_ids=ids[i * size : (i + 1) * size],
                block_ids=[*range(first + i * per_chunk, first + (i + 1) * per_chunk)],
                logits=True,
            )
            found.append(
                StepPlan(
                    step_id=len(found),
                    phase="prefill",
                    inits=[init] if i == 0 else [],
                    prefill=[part],
                )
            )
    return found


@pytest.mark.parametrize(("cp", "peer_memory"), [(4, True), (4, False), (2, True)])
def test_prefill_graphs_on_four_ranks(tmp_path: Path, cp: int, peer_memory: bool) -> None:
    """Chunks that are launched, captured and replayed: the bits of chunks that are all launched."""
    source = ModelSource(
        shape=small_flash(tmp_path, (0, 4, 128, 4)), load_format="random", max_model_len=8192
    )
    config = setup(source, cp, 4 // cp)
    config = replace(
        config,
        parallel=replace(config.parallel, peer_memory=peer_memory),
        kv_cache=KVCacheConfig(num_blocks=64, block_size=BLOCK),
    )
    steps = chunk_plans(2, 6, 1024)
    launched, none = run_world(replace(config, prefill_graphs=False), steps)
    replayed, replays = run_world(replace(config, prefill_graphs=True), steps)
    # Of the first prompt's later chunks all but two; of the second prompt all but the first, which is
    # captured then.
    assert (none, replays) == (0, 8)
    assert np.isfinite(launched).all()
    assert np.array_equal(replayed, launched)
