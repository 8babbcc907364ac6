"""The slices of all ranks together are the model, and each dequantises like the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.weight import BlockWeight
from model.checkpoint.loader import load_weights
from model.checkpoint.random_source import RandomSource
from model.checkpoint.source import load_config
from model.checkpoint.tiny import tiny_shape
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.held_bytes import held_bytes
from model.deepseek_v4.weights import (
    WeightSlice,
    inventory,
    plan_bytes,
    routed_expert,
    slice_bytes,
    weight_plan,
)
from model.errors import CheckpointError
from model.parallel.config import MeshCoord

CPU = torch.device("cpu")
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
SHARDED = ("attn.wq_b.", "attn.attn_sink", "attn.wo_a.", "attn.wo_b.")


def _plans(config: DeepSeekV4Config, cp: int, tp: int) -> list[list[WeightSlice]]:
    return [
        weight_plan(config, MeshCoord(cp=cp, tp=tp, rank=rank), load_mtp=True)
        for rank in range(cp * tp)
    ]


@pytest.mark.parametrize(("cp", "tp"), MESHES)
def test_slices_reassemble(
    small_config: DeepSeekV4Config,
    whole_tensors: Callable[[DeepSeekV4Config], dict[str, Tensor]],
    cp: int,
    tp: int,
) -> None:
    whole = whole_tensors(small_config)
    source = RandomSource(small_config, 3, CPU)
    plans = _plans(small_config, cp, tp)
    # One cp group holds every tp slice; the world holds the head and every expert.
    rebuilt = {name: torch.zeros_like(tensor.view(torch.uint8)) for name, tensor in whole.items()}
    covered: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in whole}
    for plan in plans:
        for item in plan:
            part = source.read(item)
            assert part.shape == item.shape
            assert part.is_contiguous()
            assert slice_bytes(item) == part.numel() * part.element_size()
            target, width = rebuilt[item.name], part.element_size()
            rows = slice(*item.rows) if item.rows else slice(None)
            if target.dim() == 2:
                cols = slice(*(width * c for c in item.cols)) if item.cols else slice(None)
                target[rows, cols] = part.view(torch.uint8)
            else:
                start = item.rows or (0, item.shape[0])
                target[start[0] * width : start[1] * width] = part.view(torch.uint8)
            covered[item.name][item.rows or item.cols or (0, -1)] += 1
    for name, tensor in whole.items():
        assert torch.equal(rebuilt[name], tensor.view(torch.uint8)), name
        holders = covered[name]
        if routed_expert(name) is not None:
            assert holders == {(0, -1): 1}, name  # one rank, whole
        elif name == "head.weight":
            assert holders.total() == cp * tp
            assert set(holders.values()) == {1}
        elif any(part in name for part in SHARDED) and "indexer" not in name and tp > 1:
            assert set(holders.values()) == {cp} or name.endswith(".scale"), name
            assert holders.total() == cp * tp
        else:
            assert holders == {(0, -1): cp * tp}, name  # replicated


@pytest.mark.parametrize("tp", [2, 4])
def test_sharded_weights_take_less(tiny_config: DeepSeekV4Config, tp: int) -> None:
    full = {i.name: i for i in _plans(tiny_config, 1, 1)[0]}
    for rank, plan in enumerate(_plans(tiny_config, 1, tp)):
        held = {item.name: item for item in plan}
        for name in ("layers.1.attn.wq_b.weight", "mtp.0.attn.wo_b.weight", "head.weight"):
            assert slice_bytes(held[name]) * tp == slice_bytes(full[name])
        assert held["layers.1.attn.wo_a.weight"].rows == (rank * 256 // tp, (rank + 1) * 256 // tp)
        assert held["layers.1.attn.wo_b.weight"].cols == (rank * 256 // tp, (rank + 1) * 256 // tp)
        assert held["layers.1.attn.indexer.wq_b.weight"].rows is None
        experts = {routed_expert(name) for name in held} - {None}
        assert experts == set(range(rank * 8 // tp, (rank + 1) * 8 // tp))


def _dequantised(weight: BlockWeight) -> Tensor:
    assert weight.scale is not None
    rows = (torch.arange(weight.data.shape[0]) + weight.row_offset) // 128
    cols = (torch.arange(weight.data.shape[1]) + weight.col_offset) // 128
    assert int(rows[-1]) == weight.scale.shape[0] - 1  # no scale block that the slice misses
    assert int(cols[-1]) == weight.scale.shape[1] - 1
    scale = torch.exp2(weight.scale.float() - 127)
    return weight.data.float() * scale[rows][:, cols]


@pytest.mark.parametrize("tp", [2, 4])
def test_scales_follow_slices_that_cut_blocks(small_config: DeepSeekV4Config, tp: int) -> None:
    """o_lora_rank 48: a rank's 48 or 96 rows of wo_a begin and end inside scale blocks."""
    source = RandomSource(small_config, 3, CPU)
    plans = _plans(small_config, 1, 1) + _plans(small_config, 1, tp)
    one, *ranks = (load_weights(plan, source, CPU) for plan in plans)
    for name, dim in (("wq_b", 0), ("wo_a", 0), ("wo_b", 1)):
        full_name = f"layers.1.attn.{name}.weight"
        parts = [_dequantised(rank.block(full_name)) for rank in ranks]
        assert torch.equal(torch.cat(parts, dim), _dequantised(one.block(full_name)))


@given(
    vocab=st.integers(1, 70),
    cp=st.sampled_from([1, 2, 4, 8]),
    tp=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=40, deadline=None)
def test_head_rows_cover_the_vocabulary_once(vocab: int, cp: int, tp: int) -> None:
    config = DeepSeekV4Config.from_dict({**tiny_shape(), "n_routed_experts": 32})
    config = replace(config, vocab_size=vocab, num_hidden_layers=1, num_hash_layers=0)
    size, position = -(-vocab // (cp * tp)), 0
    for plan in _plans(config, cp, tp):
        (rows,) = [item.rows for item in plan if item.name == "head.weight"]
        assert rows is not None
        assert rows[0] == position
        assert rows[1] - rows[0] == min(size, vocab - position)
        position = rows[1]
    assert position == vocab


def test_mtp_only_on_request(tiny_config: DeepSeekV4Config) -> None:
    coord = MeshCoord(cp=1, tp=1, rank=0)
    without = weight_plan(tiny_config, coord, load_mtp=False)
    assert not any(item.name.startswith("mtp.") for item in without)
    everything = weight_plan(tiny_config, coord, load_mtp=True)
    assert plan_bytes(everything) == sum(s.nbytes for s in inventory(tiny_config).values())
    with pytest.raises(CheckpointError, match="DSpark drafts are not used"):
        weight_plan(replace(tiny_config, dspark=True), coord, load_mtp=True)
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers is 0"):
        weight_plan(replace(tiny_config, num_nextn_predict_layers=0), coord, load_mtp=True)


def test_plan_refuses_a_rank_outside(tiny_config: DeepSeekV4Config) -> None:
    with pytest.raises(CheckpointError, match=r"rank 2 is outside 0\.\.1"):
        weight_plan(tiny_config, MeshCoord(cp=2, tp=1, rank=2), load_mtp=False)


def test_bytes_on_a_gpu_are_those_measured() -> None:
    """V4-Flash, cp 4: 81.8 GB allocated on an H200 on 2026-11-20, 2.9 of them caches."""
    config = load_config(path="", shape="flash")
    plan = list(weight_plan(config, MeshCoord(cp=4, tp=1, rank=0), load_mtp=False))
    held = held_bytes(plan, keep_fp4=False)
    assert held == pytest.approx(78.9e9, rel=0.005)
    experts = sum(slice_bytes(item) for item in plan if item.spec.dtype == "I8")
    # Packed, an expert takes half of FP8 and a scale byte for every 32 values, 1/16 of the codes.
    assert held - held_bytes(plan, keep_fp4=True) == pytest.approx(experts * 15 / 16, rel=1e-3)
    # Where four ranks split the shared expert in decode, each holds its gate and up rows once more.
    again = 43 * 2 * 2048 * 4096 / 4 * (1 + 1 / 128**2)
    shared = held_bytes(plan, keep_fp4=False, shares=4) - held
    assert shared == pytest.approx(again, rel=1e-6)
    # 16 blocks on 32 ranks: half of them hold a whole one.
    shared = held_bytes(plan, keep_fp4=False, shares=32) - held
    assert shared == pytest.approx(again / 4, rel=1e-6)
    assert held_bytes([item for item in plan if ".ffn.gate." in item.name], keep_fp4=False) == sum(
        slice_bytes(item) for item in plan if ".ffn.gate." in item.name
    )
