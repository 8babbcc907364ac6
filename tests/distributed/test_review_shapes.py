"""A shape in which nothing divides: slices cut FP8 blocks and ranks get uneven, even empty, shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.ranks import run_ranks
from tests.helpers.step_driver import Driver, Part, Row, rows_of

VOCAB = 9  # over 4 ranks: 3, 3, 3 and 0 rows of the head
SHAPE = shape_path(
    vocab_size=VOCAB,
    head_dim=96,  # a rank's rows of wq_b begin inside a scale block
    qk_rope_head_dim=32,
    o_lora_rank=96,  # a rank's columns of wo_b too: the block maxima are shared
    index_n_heads=3,
    index_head_dim=32,
    hidden_size=160,
    q_lora_rank=96,
    moe_intermediate_size=96,
    sliding_window=70,
    index_topk=7,
    hc_mult=3,
)
# fp32_rounded: float64 between the official rounding steps, so that a mesh moves nothing across one.
BASE = Setup(shape=SHAPE, numerics="fp32_rounded", slots=4, num_blocks=16)
TOLERANCE = 1e-6
TWO = (replace(BASE, cp=2, shard="cp"), replace(BASE, tp=2, dcp=True))
FOUR = (
    replace(BASE, cp=4, shard="cp", dcp=True),
    replace(BASE, cp=2, tp=2, gather="kv_bf16", combine="ordered"),
    replace(BASE, tp=4),
)


def program(driver: Driver) -> list[Tensor]:
    """Three requests: chunks of 1 to 169 tokens (one request has a single one), then decode."""
    lengths, out = (300, 1, 131), []
    requests = [
        driver.open([t % VOCAB for t in stream(i, n + 6)], slot=i + 1)
        for i, n in enumerate(lengths)
    ]
    for ends in ((127, 1, 3), (128, 1, 4), (131, 1, 5), lengths):
        parts = [
            Part(request=r, count=end - r.computed, mtp_logits=True)
            for r, end in zip(requests, ends, strict=True)
            if end > r.computed
        ]
        out += driver.prefill(*parts)
    for _ in range(5):
        rows = [Row(request=r, forced=1, logits=True, mtp_logits=True) for r in requests]
        out += driver.decode(*rows)
    return [rows_of(data, VOCAB) for o in out for data in (o.logits, o.mtp_logits)]


def on_rank(rank: int, world: int, setups: tuple[Setup, ...]) -> list[list[Tensor]]:
    return [program(Driver(setup, rank)) for setup in setups]


@pytest.mark.parametrize("setups", [TWO, pytest.param(FOUR, marks=pytest.mark.full)])
def test_quantised_numerics_on_every_mesh_where_nothing_divides(setups: tuple[Setup, ...]) -> None:
    expected = program(Driver(BASE))
    assert sum(map(len, expected)) > 2 * (300 + 1 + 131)
    world = setups[0].cp * setups[0].tp
    found = run_ranks(on_rank, world, setups, timeout=280)[0]
    for setup, answers in zip(setups, found, strict=True):
        for number, (a, b) in enumerate(zip(answers, expected, strict=True)):
            error = (a - b).abs().nan_to_num(float("inf"))
            assert error.numel() == 0 or error.max() < TOLERANCE, (setup.name, number)
