"""A second opinion: transformers' DeepseekV4ForCausalLM reads the same random official checkpoint.

fp32 only: transformers dequantises the weights (exactly, into bf16) and does none of the official
activation rounding. It ignores ``mtp.*``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.cli import main

pytestmark = pytest.mark.oracle

BOUND = 2e-4  # fp32 against fp32, logits of std 3
LENGTHS = (389, 131)  # past every window and top-k, and around one HCA group


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of all layer kinds, hash and score routing."""
    folder = tmp_path_factory.mktemp("tiny")
    assert main(["make-tiny", "--output", str(folder), "--seed", "11"]) == 0
    return folder


@pytest.fixture(scope="module")
def requests(checkpoint: Path) -> list[list[int]]:
    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, requests: list[list[int]]) -> list[Tensor]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    )
    model = model.float().eval()
    assert type(model).__name__ == "DeepseekV4ForCausalLM"
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in requests]


@pytest.mark.parametrize(
    ("cp", "tp", "chunk", "decode_from"),
    [(1, 1, 8192, None), (2, 1, 100, None), (2, 2, 8192, 119)],
    ids=["alone", "cp2-chunked", "cp2tp2-decode"],
)
def test_score_agrees_with_transformers(
    checkpoint: Path,
    requests: list[list[int]],
    expected: list[Tensor],
    tmp_path: Path,
    cp: int,
    tp: int,
    chunk: int,
    decode_from: int | None,
) -> None:
    source, output = tmp_path / "in.json", tmp_path / "out.safetensors"
    chosen = requests if decode_from is None else requests[1:]
    source.write_text(json.dumps({"requests": chosen}))
    settings = {
        "model.path": checkpoint,
        "model.numerics": "fp32",
        "device": "cpu",
        "cluster.executor": "local",
        "parallel.cp": cp,
        "parallel.tp": tp,
        "parallel.cp_min_tokens": 0,
        "kv_cache.num_blocks": 16,
        "scheduler.max_batched_tokens": chunk,
        "scheduler.max_num_seqs": 2,
    }
    argv = ["score", "--input", str(source), "--output", str(output)]
    for key, value in settings.items():
        argv += ["--set", f"{key}={value}"]
    if decode_from is not None:
        argv += ["--decode-from", str(decode_from)]
    assert main(argv) == 0
    got = load_file(output)
    wanted = expected if decode_from is None else expected[1:]
    assert len(got) == len(wanted)
    for index, logits in enumerate(wanted):
        rows = got[f"logits.{index}"]
        assert rows.shape == logits.shape
        assert logits.std() > 0.5  # logits that say something
        assert (rows - logits).abs().max() <= BOUND
