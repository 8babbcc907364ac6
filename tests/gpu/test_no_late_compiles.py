"""Nothing is compiled after "ready": no request waits for a compiler (vLLM 47807, 56684)."""

from __future__ import annotations

from pathlib import Path

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
from worker.protocol import DecodeSlice, PrefillSlice, SamplingParams, SlotInit, StepPlan, TailOp
from worker.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SLOTS, BLOCK = 12, 256
# One token, numbers of choices around powers of two, ends of groups and blocks, multiples of 16.
LENGTHS = (1, 2, 5, 6, 10, 11, 16, 21, 22, 42, 43, 64, 85, 86, 128, 129, 256, 300, 512, 700)
SAMPLING = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_p=0.9, logprobs=3),
    SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.1),
)


def prefill(worker: Worker, lengths: tuple[int, ...], params: SamplingParams) -> None:
    """Prompts of these lengths in slots 0, 1, .."""
    inits, chunks = [], []
    for slot, length in enumerate(lengths):
        opened = SlotInit(request_id=slot, slot=slot, sampling=params, num_prompt_tokens=length)
        blocks = range(4 * slot, 4 * slot + 1 + (length + 3) // BLOCK)
        chunk = PrefillSlice(
            request_id=slot,
            slot=slot,
            start=0,
            token_ids=list(range(length)),
            block_ids=list(blocks),
            sample=True,
        )
        inits.append(opened)
        chunks.append(chunk)
    worker.execute(StepPlan(step_id=1, phase="prefill", inits=inits, prefill=chunks))


def decode(worker: Worker, lengths: tuple[int, ...], rows: int) -> None:
    """The step behind such prompts."""
    slices = [
        DecodeSlice(request_id=slot, slot=slot, position=length, num_tokens=rows)
        for slot, length in enumerate(lengths)
    ]
    worker.execute(StepPlan(step_id=2, phase="decode", decode=slices))


def prefill_in_chunks(worker: Worker, ends: tuple[int, ...]) -> None:
    """A prompt whose chunks end there."""
    params, start = SamplingParams(), 0
    opened = [SlotInit(request_id=2, slot=2, sampling=params, num_prompt_tokens=ends[-1])]
    for end in ends:
        held = -(-start // BLOCK)
        chunk = PrefillSlice(
            request_id=2,
            slot=2,
            start=start,
            token_ids=list(range(start, end)),
            next_token=-1 if end == ends[-1] else end,
            block_ids=list(range(20 + held, 20 - (-end // BLOCK))),
            sample=end == ends[-1],
        )
        plan = StepPlan(step_id=4, phase="prefill", inits=opened, prefill=[chunk])
        worker.execute(plan)
        start, opened = end, []


def continue_behind_tail(worker: Worker) -> None:
    """A decode step's boundary is kept, and another request goes on from there."""
    opened = SlotInit(
        request_id=1,
        slot=1,
        sampling=SamplingParams(),
        num_prompt_tokens=2 * BLOCK + 90,
        start=2 * BLOCK,
        restore_tail=1,
        block_ids=[0, 1],
    )
    chunk = PrefillSlice(
        request_id=1,
        slot=1,
        start=2 * BLOCK,
        token_ids=list(range(90)),
        block_ids=[9],
        sample=True,
    )
    saves = [TailOp(slot=0, position=2 * BLOCK, tail=1)]
    plan = StepPlan(step_id=3, phase="prefill", saves=saves, inits=[opened], prefill=[chunk])
    worker.execute(plan)


@pytest.mark.parametrize(
    ("graphs", "mtp", "prefix_cache"), [(True, 2, True), (False, 0, True), (True, 0, False)]
)
def test_nothing_is_compiled_after_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool, mtp: int, prefix_cache: bool
) -> None:
    triton = pytest.importorskip("triton")
    config = WorkerConfig(
        model=ModelSource(
            shape=small_flash(tmp_path, (0, 4, 128)), load_format="random", max_model_len=2048
        ),
        device="cuda",
        kv_cache=KVCacheConfig(num_blocks=4 * SLOTS, block_size=BLOCK),
        scheduler=SchedulerConfig(
            max_num_seqs=SLOTS, max_batched_tokens=1024, prefix_cache=prefix_cache
        ),
        speculative=SpeculativeConfig(mtp=mtp),
        cuda_graphs=graphs,
    )
    compiled: list[str] = []
    worker = started(config)
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_post_compile_hook",
        lambda **kwargs: compiled.append(kwargs["fn"].name),
    )
    for length in LENGTHS:
        prefill(worker, (length,), SamplingParams())
        decode(worker, (length,), 1 + mtp)
    for batch in (2, 3, 5, 11, 12):
        lengths = tuple(3 + 7 * slot for slot in range(batch))
        prefill(worker, lengths, SamplingParams())
        decode(worker, lengths, 1 + mtp)
    for params in SAMPLING:
        prefill(worker, (2 * BLOCK + 1, 40), params)
    prefill_in_chunks(worker, (5, 6, 133, 401, 402, 500))
    if prefix_cache:
        continue_behind_tail(worker)
    torch.cuda.synchronize()
    worker.close()
    assert compiled == []
