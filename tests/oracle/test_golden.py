"""The golden cases through ``launch.py score``: every mesh, gather, sharding, chunking and decode split.

``make test`` runs a pairwise choice, ``make test-full`` all combinations. The cases come from an
independent fp64 implementation; see tests/golden/README.md for them and for the bounds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.cli import main
from tests.helpers.pairwise import pairwise

pytestmark = pytest.mark.oracle

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = ("a_swa", "b_csa", "c_hca", "d_mixed", "e_hash", "f_mtp", "g_realdims", "h_smooth")
FP32_MAX = 2e-4
ROUNDED_RMS = {  # fp32 arithmetic with the official rounding steps, against logits_release
    "a_swa": 1e-4,
    "b_csa": 0.1,
    "c_hca": 0.1,
    "d_mixed": 0.5,
    "e_hash": 1e-4,
    "f_mtp": 0.1,
    "g_realdims": 0.1,
    "h_smooth": 0.15,
}
FACTORS: dict[str, Sequence[Any]] = {
    "case": CASES,
    "mesh": ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1)),  # cp, tp
    "gather": ("kv_bf16", "compressed"),
    "shard": ("replicate", "cp"),
    "numerics": ("fp32", "fp32_rounded", "release"),
    "chunk": (8192, 97),  # tokens of a prefill step: all at once, or ends anywhere
    "decode": (False, True),
    "combine": ("fast", "ordered"),
    "block_size": (256, 128),
}
DECODED = 13  # tokens that go through the decode path, where any do


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way to compute a case."""

    case: str
    mesh: tuple[int, int]
    gather: str
    shard: str
    numerics: str
    chunk: int
    decode: bool
    combine: str
    block_size: int

    @property
    def name(self) -> str:
        cp, tp = self.mesh
        path = "decode" if self.decode else "prefill"
        return (
            f"{self.case}-cp{cp}tp{tp}-{self.gather}-{self.shard}-{self.numerics}-{self.chunk}"
            f"-{path}-{self.combine}-{self.block_size}"
        )


def canonical(row: dict[str, Any]) -> dict[str, Any]:
    """The same run without the choices that one cp rank, or one rank, does not have."""
    if row["mesh"][0] == 1:
        row = row | {"gather": "compressed", "shard": "replicate"}
    return row | {"combine": "fast"} if row["mesh"] == (1, 1) else row


def chosen_runs() -> list[Run]:
    return [Run(**row) for row in pairwise(FACTORS, canonical)]


def all_runs() -> list[Run]:
    """Every combination of what the issue lists; combine and block size vary along."""
    listed = list(FACTORS)[:7]
    runs = []
    for number, values in enumerate(itertools.product(*(FACTORS[name] for name in listed))):
        row: dict[str, Any] = dict(zip(listed, values, strict=True))
        row["combine"] = FACTORS["combine"][number % 2]
        row["block_size"] = FACTORS["block_size"][number // 2 % 2]
        runs.append(Run(**canonical(row)))
    chosen = set(chosen_runs())
    return [run for run in dict.fromkeys(runs) if run not in chosen]


def golden(case: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / case / "golden.safetensors")
    tensors |= load_file(GOLDEN / case / "golden_release.safetensors")
    return tensors


def score(run: Run, requests: list[list[int]], folder: Path) -> dict[str, Tensor]:
    """``launch.py score`` in this process; the ranks are processes of their own."""
    source, output = folder / "in.json", folder / "out.safetensors"
    source.write_text(json.dumps({"requests": requests}))
    cp, tp = run.mesh
    settings = {
        "model.path": GOLDEN / run.case,
        "model.numerics": run.numerics,
        "device": "cpu",
        "cluster.executor": "local",
        "parallel.cp": cp,
        "parallel.tp": tp,
        "parallel.cp_gather": run.gather,
        "parallel.kv_shard": run.shard,
        "parallel.moe_combine": run.combine,
        "parallel.cp_min_tokens": 0,
        "kv_cache.block_size": run.block_size,
        "kv_cache.num_blocks": 24,
        "scheduler.max_batched_tokens": run.chunk,
        "scheduler.max_num_seqs": 4,
    }
    argv = ["score", "--input", str(source), "--output", str(output)]
    for key, value in settings.items():
        argv += ["--set", f"{key}={value}"]
    if run.decode:
        argv += ["--decode-from", str(min(map(len, requests)) - DECODED)]
    if run.case == "f_mtp":
        argv.append("--mtp")
    assert main(argv) == 0
    return load_file(output)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def check(run: Run, folder: Path) -> None:
    expected = golden(run.case)
    ids = expected["input_ids"].tolist()
    # Logits are causal: a shorter request has the first rows of the golden ones. With decode, all
    # requests are decoded from the same position, so their lengths differ little.
    lengths = (len(ids), len(ids) - 6) if run.decode else (len(ids), 129, 3)
    got = score(run, [ids[:n] for n in lengths], folder)
    wanted = {f"logits.{i}" for i in range(len(lengths))}
    if run.case == "f_mtp":
        wanted |= {f"mtp_logits.{i}" for i in range(len(lengths))}
    assert set(got) == wanted
    for i, n in enumerate(lengths):
        rows = got[f"logits.{i}"]
        assert rows.shape == (n, expected["logits"].shape[1])
        assert rows.dtype == torch.float32
        if run.numerics == "fp32":
            assert (rows - expected["logits"][:n]).abs().max() <= FP32_MAX
        if run.case == "f_mtp":
            mtp = got[f"mtp_logits.{i}"]
            assert mtp.shape == (n - 1, rows.shape[1])
            if run.numerics == "fp32":
                assert (mtp - expected["mtp_logits"][: n - 1]).abs().max() <= FP32_MAX
            else:
                assert torch.isfinite(mtp).all()
    if run.numerics != "fp32":
        check_rounded(run, got["logits.0"], expected)


def check_rounded(run: Run, rows: Tensor, expected: dict[str, Tensor]) -> None:
    if run.numerics == "fp32_rounded":
        assert rms(rows - expected["logits_release"]) <= ROUNDED_RMS[run.case]
        return
    simulated = json.loads((GOLDEN / run.case / "golden.json").read_text())["sim_act+kv+idx"]
    error = rows - expected["logits"]
    assert rms(error) <= 1.3 * simulated["rms"] + 0.1
    if run.case == "h_smooth":
        assert error.abs().max() <= 1.5 * simulated["max"]


@pytest.mark.parametrize("run", chosen_runs(), ids=lambda run: run.name)
def test_golden(run: Run, tmp_path: Path) -> None:
    check(run, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("run", all_runs(), ids=lambda run: run.name)
def test_golden_full(run: Run, tmp_path: Path) -> None:
    check(run, tmp_path)


def test_pairwise_covers_every_pair() -> None:
    rows = pairwise(FACTORS, canonical)
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            row = {name: choices[-1] for name, choices in FACTORS.items()} | {a: x, b: y}
            if a == "mesh" or canonical(row) == row:
                feasible = canonical(row)[a] == x and canonical(row)[b] == y
                assert not feasible or any(r[a] == x and r[b] == y for r in rows), (a, x, b, y)
    assert len(rows) <= 48
