"""Features side by side, long chunks and long prompts, on plans and on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster.retrieval import RetrievalBuilder, RetrievalWords, program_text
from model.deepseek_v4.projection import Activations
from tests.helpers.model_setup import Setup, stream
from tests.helpers.pairwise import pairwise
from tests.helpers.parity_runs import shape_path
from tests.helpers.step_driver import Driver, Part, Row, rows_of
from worker.prefill_builder import PrefillBuilder
from worker.protocol import PrefillSlice, SamplingParams, SlotInit
from worker.slots import SlotTable

BASE = Setup(shape=shape_path(), load_mtp=False)
TOLERANCE = 1e-4


@pytest.mark.parametrize("gather", ["kv_bf16", "compressed"])
def test_indices_of_a_32k_chunk_stay_inside_local_buffers_sglang_38603(gather: str) -> None:
    """A chunk of 33,000 tokens from an odd start on four ranks: every index fits what it indexes."""
    setup = replace(BASE, gather=gather, num_blocks=300, max_len=38000, slots=2, mtp=1)
    driver = Driver(setup)
    spec, pool, device = driver.pool.spec, driver.pool, torch.device("cpu")
    start, end = 4099, 37099
    parallel = replace(driver.worker.config.parallel, cp=4)
    tokens = np.random.default_rng(0).integers(0, 128, end - start).tolist()
    item = PrefillSlice(request_id=1, slot=1, start=start, token_ids=tokens, sample=True)
    rows = 0
    for rank in range(4):
        slots = SlotTable(2, 298, cp=4, cp_rank=rank, sharded=False)
        blocks = list(range(-(-end // 128)))
        slots.open(
            SlotInit(
                request_id=1,
                slot=1,
                sampling=SamplingParams(),
                num_prompt_tokens=end,
                start=start,
                block_ids=blocks,
            )
        )
        coord = replace(driver.worker.coord, cp=4, rank=rank)
        step = PrefillBuilder(spec, parallel, coord, pool, slots, device).build([item])
        batch = step.batch
        rows += batch.num_rows
        exchanges = [(batch.window.rows, pool.layers[0].window.shape[0] * spec.ring_rows)]
        exchanges += [(g.rows, 2 * spec.state_rows(r)) for r, g in batch.groups.items()]
        for plan, ring in exchanges:
            buffer = batch.num_rows + sum(plan.counts) + len(plan.carried)
            bounds(plan.send, 0, batch.num_rows)
            bounds(plan.carried, 0, ring)
            bounds(plan.state_source, 0, buffer)
            bounds(plan.state_dest, 0, ring)
            assert plan.state_dest.unique().numel() == plan.state_dest.numel()
        window = batch.window.rows
        bounds(
            batch.window.workspace,
            0,
            batch.num_rows + sum(window.counts) + len(window.carried),
        )
        bounds(batch.window.start + batch.window.length, 0, len(batch.window.workspace) + 1)
        for ratio, group in batch.groups.items():
            buffer = batch.num_rows + sum(group.rows.counts) + len(group.rows.carried)
            bounds(group.row_index, -1, buffer)
            bounds(group.main_slots, 0, 300 * (128 // ratio))
            assert group.main_slots.unique().numel() == end // ratio - start // ratio
        assert step.fill is not None
        bounds(step.fill.local, 0, batch.num_rows)
    assert rows == end - start


def bounds(index: Tensor, low: int, high: int) -> None:
    assert index.numel() == 0 or (int(index.min()) >= low and int(index.max()) < high)


FEATURES: dict[str, tuple[Any, ...]] = {
    "mtp": (0, 1, 3),
    "hit": (False, True),
    "chunk": (999, 97),
    "company": (False, True),
    "restart": (False, True),  # preemption with recompute
    "temperature": (0.0, 1.0),
    "block_size": (128, 256),
    "penalty": (0.0, 0.5),
}


def run_features(row: dict[str, Any]) -> list[int]:
    """Twelve tokens after a prompt of 530 under a combination of features."""
    driver = Driver(replace(BASE, mtp=row["mtp"], block_size=row["block_size"]))
    sampling = SamplingParams(
        temperature=row["temperature"], seed=3, presence_penalty=row["penalty"]
    )
    prompt = stream(3, 530)
    other = driver.open(stream(8, 520), slot=6)
    driver.prefill(Part(request=other, count=510, logits=False))
    hit: dict[str, Any] = {}
    if row["hit"]:
        owner = driver.open(prompt, slot=4)
        driver.prefill(Part(request=owner, count=300, tails=((256, 0),)))
        hit = {"start": 256, "tail": 0, "blocks": owner.blocks[: 256 // row["block_size"]]}
    tokens, slot = prompt, 5
    for round_ in range(1 + row["restart"]):
        request = driver.open(tokens, slot=slot, prompt=530, sampling=sampling, **hit)
        goal = 542 if round_ == row["restart"] else 536
        while request.computed < len(tokens):
            count = min(row["chunk"], len(tokens) - request.computed)
            parts = [
                Part(request=request, count=count, sample=request.computed + count == len(tokens))
            ]
            if row["company"] and other.computed < 514:
                parts.insert(0, Part(request=other, count=1))
            driver.prefill(*parts)
        while len(request.tokens) < goal:
            drafts = min(driver.drafts(request), goal - len(request.tokens) - 1)
            rows = [Row(request=request, drafts=drafts)]
            if row["company"] and other.computed < 520:
                rows.append(Row(request=other, forced=1))
            driver.decode(*rows)
        tokens, slot = request.tokens, 2
        if not row["hit"]:
            driver.release(request)
    return tokens[530:]


def test_pairs_of_features_sglang_25646() -> None:
    """Every pair of features meets in some run; the tokens are those of the run without any."""
    rows = pairwise(FEATURES)
    assert len(rows) >= 6
    known: dict[tuple[float, float], list[int]] = {}
    for row in rows:
        plain = {name: choices[0] for name, choices in FEATURES.items()}
        plain |= {name: row[name] for name in ("temperature", "penalty")}
        key = (row["temperature"], row["penalty"])
        if key not in known:
            known[key] = run_features(plain)
        assert run_features(row) == known[key], row


@pytest.mark.full
def test_a_long_prompt_on_small_rings_sglang_24523() -> None:
    """19,000 tokens: the window ring never grows, nothing caps the prompt, chunking changes nothing."""
    shape = shape_path(num_hidden_layers=2, compress_ratios=(0, 128, 0))
    driver = Driver(
        replace(BASE, shape=shape, slots=1, num_blocks=150, max_len=19200, tails=0, load_mtp=False)
    )
    tokens = np.random.default_rng(0).integers(0, 128, 19000).tolist()
    last = []
    for chunk in (5000, 4097):
        driver.reset()
        request = driver.open(tokens, slot=0)
        while request.computed < len(tokens):
            count = min(chunk, len(tokens) - request.computed)
            (out,) = driver.prefill(Part(request=request, count=count))
        last.append(rows_of(out.logits)[-50:])
    assert (last[0] - last[1]).abs().nan_to_num(float("inf")).max() < TOLERANCE


def test_shared_expert_is_clamped_sglang_23752() -> None:
    """The shared expert clamps like the routed ones, with the current revision's bounds."""
    driver = Driver(BASE)
    net = driver.worker._model
    assert net is not None
    shared = net.blocks[1].ffn.shared
    x = torch.randn(5, 128) * 60
    gate, up = shared.w1_w3.split(x @ shared.w1_w3.weight.matrix.t())
    limit = net.config.swiglu_limit
    assert (gate > limit).any()
    assert (up.abs() > limit).any()
    hidden = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    found = shared.whole(Activations(x, None))
    torch.testing.assert_close(found, hidden @ shared.w2.matrix.t(), rtol=1e-4, atol=1e-3)


def test_rope_bases_by_layer_mlx_lm_1189() -> None:
    """Window layers and MTP: base 10,000; compressed layers: base 160,000 with YaRN, entries too."""
    driver = Driver(replace(BASE, load_mtp=True))
    net = driver.worker._model
    assert net is not None
    assert net.mtp is not None
    exponent = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    plain, wide = 10000.0**-exponent, 160000.0**-exponent
    for layer, ratio in zip([*net.blocks, net.mtp.block], (0, 4, 128, 4, 0), strict=True):
        found = layer.attn.inv_freq.double()
        if ratio == 0:
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)
            assert layer.attn.entries is None
            continue
        torch.testing.assert_close(found[:8], wide[:8], rtol=1e-5, atol=0)  # fast ones stay
        torch.testing.assert_close(found[-1:], wide[-1:] / 16, rtol=1e-5, atol=0)
        entries = layer.attn.entries
        assert entries is not None
        assert torch.equal(entries.compressor.inv_freq.double(), found)
        if entries.indexer is not None:
            assert torch.equal(entries.indexer.inv_freq.double(), found)
            assert torch.equal(entries.indexer.compressor.inv_freq.double(), found)


ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny-python"
LENGTHS = (508, 509, 510, 511, 512, 513, 639, 640, 641)  # every residue mod 4, 128k and beside it


@pytest.mark.parametrize("mtp", [0, pytest.param(2, marks=pytest.mark.full)])
def test_retrieval_at_every_residue_vllm_55927(mtp: int) -> None:
    """The trained model finds facts far beyond the window, in release numerics with fp8 caches."""
    words = RetrievalWords.from_file(ASSETS / "words.json")
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    builder = RetrievalBuilder(words, tokenizer.encode(program_text()[:60000]).ids, seed=4)
    driver = Driver(
        Setup(path=str(ASSETS), numerics="release", mtp=mtp, load_mtp=False, num_blocks=96, slots=9)
    )
    for distance in (20, 480):
        driver.reset()
        prompts = [builder.build(n, distance, i) for i, n in enumerate(LENGTHS)]
        requests = [driver.open(list(p.token_ids), slot=i) for i, p in enumerate(prompts)]
        # The last tokens of a prompt come in a chunk of their own: a query far behind its cut.
        driver.prefill(*(Part(request=r, count=500, logits=False) for r in requests))
        parts = [
            Part(request=r, count=len(r.tokens) - 500, sample=True, logits=False) for r in requests
        ]
        for prompt, out in zip(prompts, driver.prefill(*parts), strict=True):
            assert out.token_ids == [prompt.answer], (prompt.length, distance)
