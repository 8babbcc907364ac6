"""How many kernels a layer of V4-Flash starts in a decode step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from tests.helpers.one_rank import started
from tests.helpers.small_flash import small_flash
from worker.config import KVCacheConfig, ModelSource, SchedulerConfig, WorkerConfig
from worker.decode_builder import DecodeRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CSA_MUST = 25


def launches(shape: str) -> Counter[str]:
    """Kernels, copies and fills of one decode step of one request, by name."""
    config = WorkerConfig(
        model=ModelSource(shape=shape, load_format="random", max_model_len=2048),
        device="cuda",
        kv_cache=KVCacheConfig(num_blocks=16),
        scheduler=SchedulerConfig(max_num_seqs=1, prefix_cache=False),
        cuda_graphs=False,
    )
    worker = started(config)
    runner = worker._runner
    assert runner is not None
    with torch.inference_mode():
        batch = runner.decode_builder.build([DecodeRows(slot=0, position=383, tokens=[5])])
        runner._forward(batch)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as recorded:
            runner._forward(batch)
            torch.cuda.synchronize()
    worker.close()
    events = [e for e in recorded.events() or [] if e.device_type == DeviceType.CUDA]
    return Counter(e.name for e in events)


@pytest.mark.parametrize("ratio", [4, 128])
def test_launches_of_a_layer(tmp_path: Path, ratio: int) -> None:
    """The difference that a second, scored layer of a kind makes; on one rank, nothing is reduced."""
    few = launches(small_flash(tmp_path, (ratio, ratio)))
    more = launches(small_flash(tmp_path, (ratio, ratio, ratio)))
    layer = more - few
    print(f"ratio {ratio}: {layer.total()} launches")
    for name, count in sorted(layer.items()):
        print(f"  {count} x {name[:100]}")
    assert few - more == Counter()
    assert 0 < layer.total() <= CSA_MUST
