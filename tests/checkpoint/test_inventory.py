"""The inventory against the published counts, and the mesh sizes a shape allows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.shapes import named_shape, resolve_shape
from model.deepseek_v4.weights import check_mesh, inventory
from model.errors import CheckpointError
from model.parallel.config import ParallelConfig

# Published figures of the two releases: tensors, bytes, dtype histogram, MTP tensors.
RELEASES = {
    "flash": (
        69_187,
        159_609_485_896,
        {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792},
        1_575,
    ),
    "pro": (
        145_116,
        864_704_792_696,
        {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424},
        2_343,
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_release_counts(name: str) -> None:
    count, nbytes, dtypes, mtp = RELEASES[name]
    specs = inventory(named_shape(name))
    assert len(specs) == count
    assert sum(spec.nbytes for spec in specs.values()) == nbytes
    assert Counter(spec.dtype for spec in specs.values()) == dtypes
    assert sum(1 for key in specs if key.startswith("mtp.0.")) == mtp
    assert all(key == spec.name for key, spec in specs.items())


def test_shapes_of_the_specification() -> None:
    specs = inventory(named_shape("pro"))
    for key, dtype, shape in [
        ("layers.0.attn.wq_b.weight", "F8_E4M3", (65536, 1536)),
        ("layers.0.attn.wq_b.scale", "F8_E8M0", (512, 12)),
        ("layers.0.attn.compressor.ape", "F32", (128, 512)),
        ("layers.2.attn.compressor.wkv.weight", "BF16", (1024, 7168)),
        ("layers.2.attn.indexer.wq_b.scale", "F8_E8M0", (64, 12)),
        ("layers.2.attn.indexer.compressor.ape", "F32", (4, 256)),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.3.ffn.gate.bias", "F32", (384,)),
        ("layers.60.ffn.experts.383.w2.weight", "I8", (7168, 1536)),
        ("layers.60.ffn.experts.383.w2.scale", "F8_E8M0", (7168, 96)),
        ("mtp.0.ffn.gate.bias", "F32", (384,)),
        ("mtp.0.h_proj.scale", "F8_E8M0", (56, 56)),
        ("hc_head_scale", "F32", (1,)),
    ]:
        assert (specs[key].dtype, specs[key].shape) == (dtype, shape)
    assert "layers.3.ffn.gate.tid2eid" not in specs
    assert "layers.2.ffn.gate.bias" not in specs
    assert "mtp.0.attn.compressor.ape" not in specs


def test_dspark_release_keeps_the_main_model() -> None:
    flash = named_shape("flash")
    specs = inventory(replace(flash, dspark=True))
    assert len(specs) == 72_317 - 4_705  # published: all tensors, the mtp.* ones among them
    assert sum(spec.nbytes for spec in specs.values()) == 166_878_536_440 - 10_862_838_300


def test_base_release_has_fp8_experts() -> None:
    specs = inventory(replace(named_shape("flash"), expert_dtype="fp8"))
    assert len(specs) == 69_187
    assert specs["layers.5.ffn.experts.9.w1.weight"].dtype == "F8_E4M3"
    assert specs["layers.5.ffn.experts.9.w1.weight"].shape == (2048, 4096)
    assert specs["layers.5.ffn.experts.9.w1.scale"].shape == (16, 32)
    assert not any(spec.dtype == "I8" for spec in specs.values())


def test_absurd_config_is_refused_before_it_is_listed(tiny_config: DeepSeekV4Config) -> None:
    absurd = replace(tiny_config, num_hidden_layers=1024, n_routed_experts=1 << 14)
    with pytest.raises(CheckpointError, match="num_hidden_layers 1024"):
        inventory(absurd)


def test_shape_names() -> None:
    assert resolve_shape("pro") == named_shape("pro")
    with pytest.raises(CheckpointError, match=r"model\.shape = 'flesh', allowed: flash, pro"):
        resolve_shape("flesh")


@pytest.mark.parametrize(
    ("cp", "tp", "message"),
    [
        (1, 3, "parallel.tp 3 does not divide num_attention_heads 8; possible: tp 1, 2, 4"),
        (1, 8, "parallel.tp 8 does not divide o_groups 4; possible: tp 1, 2, 4"),
        (3, 1, "= 3 ranks do not divide n_routed_experts 8; possible: cp x tp 1, 2, 4, 8"),
        (4, 4, "= 16 ranks do not divide n_routed_experts 8"),
        (0, 1, "parallel.cp 0"),
    ],
)
def test_impossible_meshes(tiny_config: DeepSeekV4Config, cp: int, tp: int, message: str) -> None:
    with pytest.raises(CheckpointError) as info:
        check_mesh(tiny_config, ParallelConfig(cp=cp, tp=tp))
    assert message in str(info.value)


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (2, 4), (8, 1)])
def test_possible_meshes(tiny_config: DeepSeekV4Config, cp: int, tp: int) -> None:
    check_mesh(tiny_config, ParallelConfig(cp=cp, tp=tp))
