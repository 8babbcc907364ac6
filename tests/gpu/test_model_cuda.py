"""The whole model on one CUDA device against the golden cases: prefill, then single-token decode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.forced_plans import forced_plans
from tests.helpers.one_rank import started
from worker.config import KVCacheConfig, ModelSource, SchedulerConfig, WorkerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("a_swa", "b_csa", "c_hca", "d_mixed", "e_hash", "f_mtp", "g_realdims", "h_smooth")
# rms against logits_release: the bounds of the golden README.
ROUNDED_RMS = {"a_swa": 1e-4, "e_hash": 1e-4, "d_mixed": 0.5, "h_smooth": 0.15}


def score(case: str, numerics: str, prefilled: int) -> Tensor:
    """Logits of all tokens of a case, the first ``prefilled`` from prefill."""
    ids: list[int] = load_file(GOLDEN / case / "golden.safetensors")["input_ids"].tolist()
    config = WorkerConfig(
        model=ModelSource(path=str(GOLDEN / case), numerics=numerics, max_model_len=1024),  # type: ignore[arg-type]
        device="cuda",
        kv_cache=KVCacheConfig(num_blocks=8),
        scheduler=SchedulerConfig(max_num_seqs=2, prefix_cache=False),
    )
    worker = started(config)
    plans = forced_plans(ids, prefilled, [5, 2, 7])
    parts = [worker.execute(plan).outputs[0].logits for plan in plans]
    worker.close()
    logits = np.frombuffer(b"".join(parts), dtype=np.float32).reshape(len(ids), -1)
    return torch.from_numpy(logits.copy())


@pytest.mark.parametrize("case", CASES)
def test_fp32_equals_golden(case: str) -> None:
    golden = load_file(GOLDEN / case / "golden.safetensors")["logits"]
    error = (score(case, "fp32", golden.shape[0] - 9) - golden).abs().max().item()
    assert error <= 2e-4


@pytest.mark.parametrize("case", CASES)
def test_fp32_rounded_equals_golden(case: str) -> None:
    golden = load_file(GOLDEN / case / "golden_release.safetensors")["logits_release"]
    error = score(case, "fp32_rounded", golden.shape[0] - 9) - golden
    assert error.square().mean().sqrt().item() <= ROUNDED_RMS.get(case, 0.1)


@pytest.mark.parametrize("case", CASES)
def test_release_is_within_rounding(case: str) -> None:
    golden = load_file(GOLDEN / case / "golden_release.safetensors")["logits_release"]
    simulated = json.loads((GOLDEN / case / "golden.json").read_text())["sim_act+kv+idx"]
    error = score(case, "release", golden.shape[0] - 9) - golden
    assert error.square().mean().sqrt().item() <= 1.3 * simulated["rms"] + 0.1
    if case == "h_smooth":
        assert error.abs().max().item() <= 1.5 * simulated["max"]
