"""Decode through captured graphs: the logits of steps launched one by one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.one_rank import started
from tests.helpers.small_flash import small_flash
from worker.config import (
    KVCacheConfig,
    ModelSource,
    SchedulerConfig,
    SpeculativeConfig,
    WorkerConfig,
)
from worker.protocol import DecodeSlice, PrefillSlice, SamplingParams, SlotInit, StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = (517, 130, 259)


def decode_logits(shape: str, *, cuda_graphs: bool, mtp: int = 0) -> tuple[list[bytes], list[int]]:
    """Logits and tokens of three requests that join and leave a batch of decode steps."""
    config = WorkerConfig(
        model=ModelSource(shape=shape, load_format="random", max_model_len=2048),
        device="cuda",
        kv_cache=KVCacheConfig(num_blocks=32),
        scheduler=SchedulerConfig(max_num_seqs=5, prefix_cache=False),
        speculative=SpeculativeConfig(mtp=mtp),
        cuda_graphs=cuda_graphs,
    )
    worker = started(config)
    draw = np.random.default_rng(0)
    position, found, tokens, step = {}, [], [], 0
    for slot, length in enumerate(PROMPTS):
        init = SlotInit(
            request_id=slot, slot=slot, sampling=SamplingParams(), num_prompt_tokens=length
        )
        chunk = PrefillSlice(
            request_id=slot,
            slot=slot,
            start=0,
            token_ids=draw.integers(2048, size=length).tolist(),
            block_ids=list(range(6 * slot, 6 * slot + 6)),
            sample=True,
        )
        worker.execute(StepPlan(step_id=step, phase="prefill", inits=[init], prefill=[chunk]))
        position[slot] = length
        for running in (range(slot + 1), range(slot, slot + 1)) * 3:
            step += 1
            rows = [
                DecodeSlice(
                    request_id=s, slot=s, position=position[s], num_tokens=1 + mtp, logits=True
                )
                for s in running
            ]
            plan = StepPlan(step_id=step, phase="decode", decode=rows)
            for s, out in zip(running, worker.execute(plan).outputs, strict=True):
                found.append(out.logits)
                tokens += out.token_ids
                position[s] += len(out.token_ids)
    worker.close()
    return found, tokens


@pytest.mark.parametrize("mtp", [0, 2])
def test_graphs_change_no_bit(tmp_path: Path, mtp: int) -> None:
    shape = small_flash(tmp_path, (0, 4, 128, 4))
    replayed = decode_logits(shape, cuda_graphs=True, mtp=mtp)
    launched = decode_logits(shape, cuda_graphs=False, mtp=mtp)
    assert replayed == launched
    assert all(np.isfinite(np.frombuffer(part, np.float32)).all() for part in replayed[0])
