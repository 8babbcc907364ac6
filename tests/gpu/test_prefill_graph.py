"""Prefill through captured graphs on one GPU: the logits of steps launched one by one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.one_rank import started
from tests.helpers.small_flash import VOCAB, small_flash
from worker.config import (
    KVCacheConfig,
    ModelSource,
    SchedulerConfig,
    SpeculativeConfig,
    WorkerConfig,
)
from worker.prefill_graph import CaptureChoice
from worker.protocol import DecodeSlice, PrefillSlice, SamplingParams, SlotInit, StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BLOCK = 256
# With two graphs at once, idle after two steps: launches, captures, replays and graphs that make room.
LENGTHS = (517, 1024, 517, 1024, 130, 517, 1024, 130, 259, 517, 259, 7, 700, 7, 700, 130, 700, 517)


def logits(
    shape: str, *, prefill_graphs: bool, mtp: int, keep_fp4: bool
) -> tuple[list[bytes], list[int]]:
    """Every row's logits of prompts, each followed by a decode step; and the sampled tokens."""
    config = WorkerConfig(
        model=ModelSource(shape=shape, load_format="random", max_model_len=2048, keep_fp4=keep_fp4),
        device="cuda",
        kv_cache=KVCacheConfig(num_blocks=32, block_size=BLOCK),
        scheduler=SchedulerConfig(max_num_seqs=4, max_batched_tokens=1024, prefix_cache=False),
        speculative=SpeculativeConfig(mtp=mtp),
        prefill_graphs=prefill_graphs,
    )
    worker = started(config)
    assert not worker.prefill_obstacle()
    runner = worker._runner
    assert runner is not None
    assert (runner.prefill_graphs is not None) == prefill_graphs
    rehearsed = 0
    if runner.prefill_graphs is not None:
        rehearsed = runner.prefill_graphs.num_replays
        runner.prefill_graphs.close()  # also: a new pool after all graphs are gone
        runner.prefill_graphs._choice = CaptureChoice(kept=2, idle=2)
    draw = np.random.default_rng(0)
    found, tokens = [], []
    for number, length in enumerate(LENGTHS):
        slot = number % 4
        init = SlotInit(
            request_id=number, slot=slot, sampling=SamplingParams(), num_prompt_tokens=length
        )
        chunk = PrefillSlice(
            request_id=number,
            slot=slot,
            start=0,
            token_ids=draw.integers(VOCAB, size=length).tolist(),
            block_ids=(8 * slot + draw.permutation(6)).tolist(),
            sample=True,
            logits=True,
        )
        (out,) = worker.execute(
            StepPlan(step_id=2 * number, phase="prefill", inits=[init], prefill=[chunk])
        ).outputs
        row = DecodeSlice(
            request_id=number, slot=slot, position=length, num_tokens=1 + mtp, logits=True
        )
        (after,) = worker.execute(
            StepPlan(step_id=2 * number + 1, phase="decode", decode=[row])
        ).outputs
        found += [out.logits, after.logits]
        tokens += [*out.token_ids, *after.token_ids]
    if runner.prefill_graphs is not None:
        assert runner.prefill_graphs.num_replays - rehearsed == 4
    worker.close()
    return found, tokens


@pytest.mark.parametrize(("mtp", "keep_fp4"), [(0, False), (2, False), (0, True)])
def test_prefill_graphs_change_no_bit(tmp_path: Path, mtp: int, keep_fp4: bool) -> None:
    shape = small_flash(tmp_path, (0, 4, 128, 4))
    replayed = logits(shape, prefill_graphs=True, mtp=mtp, keep_fp4=keep_fp4)
    launched = logits(shape, prefill_graphs=False, mtp=mtp, keep_fp4=keep_fp4)
    assert replayed == launched
    assert all(np.isfinite(np.frombuffer(part, np.float32)).all() for part in replayed[0])
