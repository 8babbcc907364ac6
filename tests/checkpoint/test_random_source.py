"""Random weights: from the seed and the name alone, in the checkpoint's formats, of sane size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.checkpoint.random_source import RandomSource
from model.checkpoint.tiny import tiny_shape
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import WeightSlice, inventory

CPU = torch.device("cpu")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _read(source: RandomSource, name: str) -> Tensor:
    return source.read(WeightSlice(name=name, spec=inventory(source.config)[name]))


def _dequantised(source: RandomSource, prefix: str) -> Tensor:
    data = _read(source, f"{prefix}.weight")
    scale = torch.exp2(_read(source, f"{prefix}.scale").float() - 127)
    if data.dtype == torch.int8:
        codes = data.view(torch.uint8).int()
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        return values * scale.repeat_interleave(32, 1)
    rows, cols = data.shape
    grid = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return data.float() * grid


def test_seed_and_name_decide(tiny_config: DeepSeekV4Config) -> None:
    name = "layers.1.attn.wq_b.weight"
    first = _read(RandomSource(tiny_config, 5, CPU), name)
    torch.manual_seed(99)  # the global generator plays no part
    torch.randn(10)
    assert torch.equal(first.float(), _read(RandomSource(tiny_config, 5, CPU), name).float())
    assert not torch.equal(first.float(), _read(RandomSource(tiny_config, 6, CPU), name).float())
    other = _read(RandomSource(tiny_config, 5, CPU), "layers.2.attn.wq_b.weight")
    assert not torch.equal(first.float(), other.float())


def test_a_deeper_model_shares_its_lower_layers(tiny_config: DeepSeekV4Config) -> None:
    deeper = replace(tiny_config, num_hidden_layers=6, compress_ratios=(0, 4, 128, 4, 128, 4))
    name = "layers.4.ffn.experts.2.w3.weight"
    assert torch.equal(
        _read(RandomSource(tiny_config, 0, CPU), name), _read(RandomSource(deeper, 0, CPU), name)
    )


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_dequantised_deviation(tiny_config: DeepSeekV4Config, expert_dtype: str) -> None:
    source = RandomSource(replace(tiny_config, expert_dtype=expert_dtype), 1, CPU)
    for prefix in (
        "layers.1.attn.wq_b",
        "layers.1.attn.wkv",
        "layers.0.attn.wo_a",
        "layers.2.ffn.experts.3.w1",
        "layers.2.ffn.experts.3.w2",
        "layers.2.ffn.shared_experts.w2",
        "mtp.0.h_proj",
    ):
        values = _dequantised(source, prefix)
        assert values.isfinite().all()
        unit = values * math.sqrt(values.shape[1])  # 1 / sqrt(fan_in) makes outputs of size 1
        assert unit.std().item() == pytest.approx(1, abs=0.04), prefix
        assert abs(unit.mean().item()) < 0.03


def test_scales_differ_between_blocks(tiny_config: DeepSeekV4Config) -> None:
    """Equal scales would hide a scale that is read from the wrong block."""
    source = RandomSource(tiny_config, 1, CPU)
    for name in ("layers.1.attn.wq_b.scale", "layers.1.ffn.experts.0.w2.scale"):
        assert len(_read(source, name).unique()) == 2


def test_plain_tensors(tiny_config: DeepSeekV4Config) -> None:
    source = RandomSource(tiny_config, 1, CPU)
    for name, spec in inventory(tiny_config).items():
        if spec.dtype in ("BF16", "F32"):
            values = _read(source, name).float()
            assert values.isfinite().all(), name
            assert values.abs().max() < 6, name
            if name.endswith("norm.weight"):
                assert values.mean().item() == pytest.approx(1, abs=0.05), name
                assert values.min() > 0.3, name
    assert _read(source, "head.weight").float().std().item() == pytest.approx(1 / 16, rel=0.03)


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (8, 8), (5, 3), (1, 1), (256, 6)])
def test_expert_table(experts: int, chosen: int) -> None:
    shape = {**tiny_shape(), "n_routed_experts": experts, "num_experts_per_tok": chosen}
    source = RandomSource(DeepSeekV4Config.from_dict(shape), 1, CPU)
    table = _read(source, "layers.1.ffn.gate.tid2eid")
    assert table.dtype == torch.int64
    assert table.shape == (288, chosen)
    assert table.min() >= 0
    assert table.max() < experts
    assert all(len(row.unique()) == chosen for row in table)
    assert len(table.unique()) > experts * 0.9
