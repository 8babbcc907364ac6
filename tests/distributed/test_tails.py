"""A prefix hit continues exactly as the cold run: tails hold all that the pages do not.

Regression for SGLang 34562 (state recomputed, not restored) and 30339, ATOM 1417 (the window ring is
not content-addressed: empty output on a hit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.cache_contents import merged, poison_slot
from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.ranks import run_ranks
from tests.helpers.step_driver import Driver, Part, Request, Row, rows_of

BASE = Setup(shape=shape_path(), load_mtp=False)
TOLERANCE = 1e-4
NEW_TOKENS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a request showed: logits of the last prompt rows, tokens, accepted drafts, caches."""

    logits: Tensor
    tokens: list[int]
    accepted: list[int]
    contents: list[dict[str, Tensor]]


def finish(driver: Driver, request: Request) -> Seen:
    """Prefill what is left of the prompt and decode some tokens."""
    begin = len(request.tokens)
    (answer,) = driver.prefill(Part(request=request, count=begin - request.computed, sample=True))
    accepted = []
    while len(request.tokens) < begin + NEW_TOKENS:
        (out,) = driver.decode(Row(request=request, drafts=driver.drafts(request)))
        accepted.append(out.num_accepted)
    return Seen(
        logits=rows_of(answer.logits),
        tokens=request.tokens[begin:],
        accepted=accepted,
        contents=driver.contents(request),
    )


def cold_and_warm(
    driver: Driver, tokens: list[int], start: int, tail: int, blocks: list[int]
) -> tuple[Seen, Seen]:
    """The same prompt from nothing in one slot, and from a hit in another; both slots poisoned."""
    for slot in (5, 6):
        poison_slot(driver.pool, slot)
    request = driver.open(tokens, slot=5)
    cold = finish(driver, request)
    driver.release(request)
    warm = finish(driver, driver.open(tokens, slot=6, start=start, tail=tail, blocks=blocks))
    return cold, warm


def prompts(first: list[int], boundary: int, rests: tuple[int, ...]) -> list[list[int]]:
    """The shared prefix with continuations of their own."""
    return [first[:boundary] + stream(20 + i, n) for i, n in enumerate(rests)]


def tails_of_prefill(driver: Driver) -> list[tuple[Seen, Seen]]:
    """Tails saved in the middle of a chunk, at its end, and in a second chunk."""
    driver.reset()
    size = driver.setup.block_size
    text = stream(0, 3 * size + 40)
    owner = driver.open(text, slot=1)
    # The chunk before may end anywhere: the second one starts with carried rows.
    driver.prefill(Part(request=owner, count=2 * size - 3, tails=((size, 0),)))
    driver.prefill(Part(request=owner, count=size + 3, tails=((2 * size, 1), (3 * size, 2))))
    driver.prefill(Part(request=owner, count=40))
    pairs = []
    for tail, boundary in enumerate((size, 2 * size, 3 * size)):
        for tokens in prompts(text, boundary, (1, 130) if tail == 1 else (45,)):
            blocks = owner.blocks[: boundary // size]
            pairs.append(cold_and_warm(driver, tokens, boundary, tail, blocks))
    return pairs


def tails_of_decode(driver: Driver) -> list[tuple[Seen, Seen]]:
    """Tails saved after decode has crossed a boundary, with drafts on both sides of it."""
    pairs = []
    size = driver.setup.block_size
    for prompt in (size - 2, size - 1, size):
        driver.reset()
        owner = driver.open(stream(0, prompt), slot=0)
        driver.prefill(Part(request=owner, count=prompt, sample=True, logits=False))
        while owner.computed < size:
            driver.decode(Row(request=owner, drafts=driver.drafts(owner)))
        driver.save_tail(owner, size, 3)
        driver.decode(Row(request=owner, drafts=driver.drafts(owner)))
        (tokens,) = prompts(owner.tokens, size, (37,))
        pairs.append(cold_and_warm(driver, tokens, size, 3, owner.blocks[:1]))
    return pairs


def both(driver: Driver) -> list[tuple[Seen, Seen]]:
    return tails_of_prefill(driver) + tails_of_decode(driver)


def on_rank(rank: int, world: int, setups: list[Setup]) -> list[Any]:
    return [both(Driver(setup, rank)) for setup in setups]


def check(setup: Setup, by_rank: list[list[tuple[Seen, Seen]]]) -> None:
    # A cache in bfloat16 turns float32 rounding into a last bit now and then.
    bound = TOLERANCE if setup.dtype == "auto" else 0.05
    for number, pair in enumerate(by_rank[0]):
        cold, warm = pair
        error = (warm.logits - cold.logits[-len(warm.logits) :]).abs().nan_to_num(float("inf"))
        assert error.max() < bound, number
        assert warm.tokens == cold.tokens, number
        assert warm.accepted == cold.accepted, number
        kinds = [merged([r[number][k].contents for r in by_rank], setup) for k in (0, 1)]
        for layer, (a, b) in enumerate(zip(*kinds, strict=True)):
            for name in a:
                worst = (a[name] - b[name]).abs().nan_to_num(float("inf")).max()
                assert worst < bound, (number, layer, name)


SETUPS = [
    BASE,
    replace(BASE, block_size=256),
    replace(BASE, mtp=1),
    replace(BASE, mtp=3, block_size=256),
    replace(BASE, mtp=2, dtype="bf16"),
]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: s.name)
def test_warm_prefix_equals_cold_run_sglang_34562_atom_1417(setup: Setup) -> None:
    driver = Driver(setup)
    check(setup, [both(driver)])


TWO = [
    replace(BASE, cp=2, mtp=1, shard="cp"),
    replace(BASE, tp=2, mtp=2),
]
FOUR = [
    replace(BASE, cp=4, gather="kv_bf16", block_size=256),
    replace(BASE, cp=4, mtp=2, shard="cp", dcp=True),
    replace(BASE, cp=2, tp=2, mtp=1, gather="kv_bf16", shard="cp"),
]


def test_warm_prefix_equals_cold_run_on_two_ranks_sglang_34562() -> None:
    ranks = run_ranks(on_rank, 2, TWO, timeout=280)
    for i, setup in enumerate(TWO):
        check(setup, [found[i] for found in ranks])


@pytest.mark.full
def test_warm_prefix_equals_cold_run_on_four_ranks_sglang_34562() -> None:
    ranks = run_ranks(on_rank, 4, FOUR, timeout=280)
    for i, setup in enumerate(FOUR):
        check(setup, [found[i] for found in ranks])


@pytest.mark.parametrize("numerics", ["fp32", "release"])
def test_a_tail_moves_every_cache_kind_vllm_57661(numerics: str) -> None:
    """Save, poison, restore in another slot: windows of all layers and CSA states, bit for bit."""
    driver = Driver(replace(BASE, mtp=1, numerics=numerics))
    owner = driver.open(stream(4, 256), slot=2)
    driver.prefill(Part(request=owner, count=256, tails=((256, 4),)))
    expected = driver.contents(owner)
    for slot in (2, 3):
        poison_slot(driver.pool, slot)
    driver.pool.restore_tail(3, 256, 4)
    moved = driver.contents(replace_slot(owner, 3))
    for layer, (a, b) in enumerate(zip(moved, expected, strict=True)):
        for name in ("window", "state"):
            if name in a:
                assert torch.equal(a[name], b[name]), (layer, name)
    assert driver.pool.tail_streams[4].isfinite().all()
    untouched = [t for t in range(driver.info.num_tails) if t != 4]
    for layer_cache in driver.pool.layers:
        assert (layer_cache.tail_window[untouched] == 0xFF).all()


def replace_slot(request: Request, slot: int) -> Request:
    return Request(
        id=request.id,
        slot=slot,
        tokens=request.tokens,
        computed=request.computed,
        blocks=request.blocks,
    )


@pytest.mark.parametrize("position", [0, 100, -128])
def test_a_tail_between_blocks_is_refused(position: int) -> None:
    driver = Driver(replace(BASE, slots=1))
    with pytest.raises(ValueError, match="multiples of 128"):
        driver.pool.save_tail(0, position, 0)
