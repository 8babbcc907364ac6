"""Speculation changes speed only: tokens and caches are those of a run that never drafted."""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.helpers.cache_contents import merged
from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.ranks import run_ranks
from tests.helpers.step_driver import Driver, Part, Request, Row, rows_of
from worker.protocol import SamplingParams

BASE = Setup(shape=shape_path(), load_mtp=False)
TOLERANCE = 1e-4
# Verify steps from here cross positions 4k +- 1 and 128k +- 1 in every phase of the pattern below.
PROMPTS = (121, 125, 126, 127, 128, 131, 251, 255)
NEW_TOKENS = 11
RIGHT = (3, 0, 1, 2, 0, 3, 1, 0, 2, 3, 0)  # how many drafts of a step are made right


def plan_drafts(driver: Driver, request: Request, answer: list[int], step: int) -> int:
    """Replace the slot's drafts: the first few are what the model will say, the rest is wrong."""
    assert driver.worker._slots is not None
    slot = driver.worker._slots.slots[request.slot]
    assert slot is not None
    assert len(slot.drafts) == driver.setup.mtp
    done = len(request.tokens)
    right = min(RIGHT[step % len(RIGHT)], driver.setup.mtp)
    coming = answer[done : done + driver.setup.mtp]
    coming += [0] * (driver.setup.mtp - len(coming))
    wrong = [(t + 1) % 128 for t in coming]
    slot.drafts = coming[:right] + wrong[right:]
    return len(slot.drafts)


def speculate(driver: Driver, answers: dict[int, list[int]], sampling: SamplingParams) -> Any:
    """Generate after each prompt with planned drafts; returns tokens and caches by prompt length."""
    found = {}
    for number, length in enumerate(PROMPTS):
        driver.reset()
        tokens = stream(number, length)
        request = driver.open(tokens, slot=number % 4, sampling=sampling)
        driver.prefill(Part(request=request, count=length, sample=True, logits=False))
        step, answer, most = 0, answers.get(length, []), 0
        while len(request.tokens) < length + NEW_TOKENS:
            drafts = plan_drafts(driver, request, answer, step) if driver.setup.mtp else 0
            room = length + NEW_TOKENS - len(request.tokens)
            (out,) = driver.decode(Row(request=request, drafts=min(drafts, room - 1)))
            most = max(most, out.num_accepted)
            step += 1
        assert len(request.tokens) == length + NEW_TOKENS
        assert most == driver.setup.mtp  # else this run shows nothing
        found[length] = (request.tokens, driver.contents(request))
    return found


@functools.cache
def plain(sampling: SamplingParams) -> Any:
    """The run without drafts, on one rank."""
    return speculate(Driver(BASE), {}, sampling)


def answers(sampling: SamplingParams) -> dict[int, list[int]]:
    return {length: tokens for length, (tokens, _) in plain(sampling).items()}


def check(found: Any, sampling: SamplingParams) -> None:
    for length, (tokens, contents) in found.items():
        wanted_tokens, wanted = plain(sampling)[length]
        assert tokens == wanted_tokens, length
        for layer, (a, b) in enumerate(zip(contents, wanted, strict=False)):
            for name in b:
                worst = (a[name] - b[name]).abs().nan_to_num(float("inf")).max()
                assert worst < TOLERANCE, (length, layer, name)
        if len(contents) > len(wanted):
            assert contents[-1]["window"].isfinite().all()


GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=7)


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_rejected_drafts_leave_no_trace(drafts: int) -> None:
    """Tokens, windows, states and entries across 4k +- 1 and 128k +- 1 (drafts left in HCA state)."""
    check(speculate(Driver(replace(BASE, mtp=drafts)), answers(GREEDY), GREEDY), GREEDY)


def test_same_distribution_with_and_without_mtp_vllm_41044() -> None:
    """At temperature 1 a draft shares the noise of its position: the very same tokens come out."""
    assert answers(SAMPLED) != answers(GREEDY)
    check(speculate(Driver(replace(BASE, mtp=2)), answers(SAMPLED), SAMPLED), SAMPLED)


def on_rank(rank: int, world: int, setups: list[Setup], known: dict[int, list[int]]) -> list[Any]:
    return [speculate(Driver(setup, rank), known, GREEDY) for setup in setups]


MESHES = {
    2: [replace(BASE, cp=2, mtp=3, shard="cp"), replace(BASE, tp=2, mtp=2)],
    4: [replace(BASE, cp=4, mtp=3, dcp=True), replace(BASE, cp=2, tp=2, mtp=1, gather="kv_bf16")],
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_rejected_drafts_leave_no_trace_on_any_mesh(world: int) -> None:
    setups = MESHES[world]
    ranks = run_ranks(on_rank, world, setups, answers(GREEDY), timeout=280)
    for i, setup in enumerate(setups):
        found = {
            length: (
                ranks[0][i][length][0],
                merged([rank[i][length][1] for rank in ranks], setup),
            )
            for length in PROMPTS
        }
        check(found, GREEDY)


def test_first_draft_sees_no_stale_window_row() -> None:
    """The last prompt row is computed again by the first draft and sees 127 rows before itself.

    Found here: the MTP ring kept 127 rows of a chunk, the 128th was another request's.
    """
    driver = Driver(replace(BASE, mtp=1))
    seen = []
    for chunks in ((300,), (172, 128), (171, 129), (170, 1, 127, 2)):
        driver.reset()
        request = driver.open(stream(1, 300), slot=3)
        for count in chunks:
            last = request.computed + count == 300
            driver.prefill(Part(request=request, count=count, sample=last, logits=False))
        assert driver.worker._slots is not None
        slot = driver.worker._slots.slots[3]
        assert slot is not None
        seen.append((request.tokens[300:], slot.drafts, driver.contents(request)[-1]["window"]))
    for tokens, drafts, window in seen[1:]:
        assert (tokens, drafts) == seen[0][:2]
        assert (window - seen[0][2]).abs().max() < TOLERANCE


# --- the trained model -------------------------------------------------------------------------

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny-python"
TRAINED = Setup(path=str(ASSETS), numerics="release", load_mtp=True, num_blocks=32, slots=2)
FLOOR = 0.6  # README of the model: 0.73 on held-out files; broken drafts fall below 0.1


def teacher_forced(driver: Driver, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Top-1 tokens of a text: of the main model per row, and of the MTP block for the row after."""
    driver.reset()
    request = driver.open(tokens, slot=1)
    (out,) = driver.prefill(Part(request=request, count=len(tokens), mtp_logits=True))
    width = 2048
    return rows_of(out.logits, width).argmax(1), rows_of(out.mtp_logits, width).argmax(1)


def test_mtp_acceptance_of_the_trained_model_vllm_42320() -> None:
    """Release numerics, fp8 caches: acceptance on Python text, and in decode what prefill predicts."""
    driver = Driver(replace(TRAINED, mtp=1))
    text = Tokenizer.from_file(str(ASSETS / "tokenizer.json")).encode(inspect.getsource(textwrap))
    main, mtp = teacher_forced(driver, [0, *text.ids[:767]])
    agreement = (mtp[:-1] == main[1:-1]).double().mean().item()
    assert agreement > FLOOR, agreement

    entries = json.loads((ASSETS / "golden.json").read_text())["prompts"]
    accepted = offered = 0
    predicted = []
    for entry in entries[:2]:
        driver.reset()
        prompt = entry["prompt_ids"]
        request = driver.open(prompt, slot=0)
        driver.prefill(Part(request=request, count=len(prompt), sample=True, logits=False))
        verified = []
        while len(request.tokens) < len(prompt) + 80:
            verified.append(len(request.tokens))  # where the draft would stand
            (out,) = driver.decode(Row(request=request, drafts=driver.drafts(request)))
            accepted, offered = accepted + out.num_accepted, offered + out.num_drafts
        _, mtp = teacher_forced(driver, request.tokens)
        predicted += [request.tokens[p] == int(mtp[p - 2]) for p in verified]
    assert offered == len(predicted)
    assert accepted / offered > FLOOR
    assert abs(accepted / offered - sum(predicted) / offered) <= 0.03


def test_mtp_logits_agree_between_prefill_and_decode_vllm_42930() -> None:
    """The streams that feed the MTP block do not drift on the decode path (trained model, fp32)."""
    driver = Driver(replace(TRAINED, numerics="fp32"))
    entries = json.loads((ASSETS / "golden.json").read_text())["prompts"]
    tokens = (entries[0]["prompt_ids"] + entries[0]["greedy_ids"])[:150]
    request = driver.open(tokens, slot=0)
    (whole,) = driver.prefill(Part(request=request, count=len(tokens), mtp_logits=True))
    other = driver.open(tokens, slot=1)
    driver.prefill(Part(request=other, count=len(tokens) - 20, mtp_logits=True))
    rows = []
    while other.computed < len(tokens) - 1:
        (out,) = driver.decode(Row(request=other, forced=1, mtp_logits=True))
        rows.append(rows_of(out.mtp_logits, 2048))
    found = torch.cat(rows)
    wanted = rows_of(whole.mtp_logits, 2048)[-len(found) :]
    assert len(found) == 19
    assert (found - wanted).abs().max() < 2e-3  # logits reach 40 here
