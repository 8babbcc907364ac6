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
    ids: list[int],
    prefilled: int,
    answer: SimpleQueue[bytes],
) -> None:
    parallel = config.parallel
    coord = MeshCoord(cp=parallel.cp, tp=parallel.tp, rank=rank)
    worker = Worker(config, coord, device_index=rank)
    worker.init_distributed(init_method)
    worker.load()
    worker.init_cache()
    worker.warm_up()
    blocks = list(range(-(-(len(ids) + 8) // BLOCK)))
    outputs = [worker.execute(plan).outputs for plan in forced_plans(ids, prefilled, blocks)]
    if rank == 0:
        answer.put(b"".join(step[0].logits for step in outputs))
    worker.close()


def world(config: WorkerConfig, ids: list[int], prefilled: int) -> np.ndarray:
    """Logits [tokens, vocabulary] of one process per GPU."""
    store, init_method = serve_store("127.0.0.1", 120)
    context = multiprocessing.get_context("spawn")
    answer: SimpleQueue[bytes] = context.SimpleQueue()
    ranks = [
        context.Process(target=run_rank, args=(rank, config, init_method, ids, prefilled, answer))
        for rank in range(config.parallel.world)
    ]
    for process in ranks:
        process.start()
    while answer.empty():
        assert all(p.exitcode in (None, 0) for p in ranks), [p.exitcode for p in ranks]
        ranks[0].join(0.2)
    logits = np.frombuffer(answer.get(), np.float32).reshape(len(ids), -1)
    for process in ranks:
        process.join(60)
    assert [p.exitcode for p in ranks] == [0] * len(ranks)
    del store  # it must outlive the ranks
    return logits


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
