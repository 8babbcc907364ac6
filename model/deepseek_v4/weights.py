"""Every tensor of an official V4 checkpoint, and which part of each a rank of the mesh holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from model.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config
from model.errors import CheckpointError
from model.parallel.config import MeshCoord, ParallelConfig

FP8_BLOCK = 128  # an FP8 weight has one E8M0 scale per 128 x 128 values
FP4_BLOCK = 32  # an FP4 weight has one E8M0 scale per 32 values of a row

DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}

# Tensors a config may ask for; Pro has 145,116. A config beyond this is absurd, not large.
_MAX_TENSORS = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of the checkpoint: official name, safetensors dtype name, stored shape."""

    name: str
    dtype: str  # a key of DTYPE_BYTES; I8 holds two FP4 values per byte
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSlice:
    """The part of one tensor that a rank holds; ``stop`` is exclusive, None means all.

    Rows are dim 0 and columns dim 1 of the stored tensor, so a scale tensor has ranges of its own.
    """

    name: str
    spec: TensorSpec
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        shape = list(self.spec.shape)
        for dim, span in enumerate((self.rows, self.cols)):
            if span is not None:
                shape[dim] = span[1] - span[0]
        return tuple(shape)


def slice_bytes(item: WeightSlice) -> int:
    """Bytes that a slice takes on its rank."""
    return math.prod(item.shape) * DTYPE_BYTES[item.spec.dtype]


def plan_bytes(plan: Iterable[WeightSlice]) -> int:
    """Bytes that a whole plan takes on its rank."""
    return sum(slice_bytes(item) for item in plan)


def inventory(config: DeepSeekV4Config) -> dict[str, TensorSpec]:
    """Every tensor that an official checkpoint of this shape must hold, in model order.

    A DSpark (0731) release holds further ``mtp.*`` tensors, which are not used and not listed.

    Raises:
        CheckpointError: a config that asks for an absurd number of tensors.
    """
    blocks = config.num_hidden_layers + config.num_mtp_layers
    if blocks * (6 * config.n_routed_experts + 64) > _MAX_TENSORS:
        raise CheckpointError(
            f"num_hidden_layers {config.num_hidden_layers} with n_routed_experts"
            f" {config.n_routed_experts} asks for more than {_MAX_TENSORS} tensors"
        )
    return {spec.name: spec for spec in _specs(config)}


def check_mesh(config: DeepSeekV4Config, parallel: ParallelConfig) -> None:
    """Refuse mesh sizes that this shape cannot be cut into.

    Raises:
        CheckpointError: with the size that does not divide and the sizes that would.
    """
    if parallel.cp < 1 or parallel.tp < 1:
        raise CheckpointError(
            f"parallel.cp {parallel.cp} and parallel.tp {parallel.tp} must both be at least 1"
        )
    heads, groups, experts = config.num_attention_heads, config.o_groups, config.n_routed_experts
    for key, count in (("num_attention_heads", heads), ("o_groups", groups)):
        if count % parallel.tp:
            raise CheckpointError(
                f"parallel.tp {parallel.tp} does not divide {key} {count};"
                f" possible: tp {_listed(_divisors(math.gcd(heads, groups)))}"
            )
    if experts % parallel.world:
        raise CheckpointError(
            f"parallel.cp {parallel.cp} x parallel.tp {parallel.tp} = {parallel.world} ranks do not"
            f" divide n_routed_experts {experts}; possible: cp x tp"
            f" {_listed(_divisors(experts))}"
        )


def weight_plan(config: DeepSeekV4Config, coord: MeshCoord, *, load_mtp: bool) -> list[WeightSlice]:
    """What the rank at ``coord`` holds, in model order.

    Head slices (``wq_b``, ``attn_sink``, ``wo_a``, ``wo_b``) follow the tp axis, the output head
    and the routed experts the whole world; everything else is replicated.

    Raises:
        CheckpointError: an impossible mesh, or ``load_mtp`` for a model without a usable MTP block.
    """
    check_mesh(config, ParallelConfig(cp=coord.cp, tp=coord.tp))
    if not 0 <= coord.rank < coord.world:
        raise CheckpointError(f"rank {coord.rank} is outside 0..{coord.world - 1}")
    if load_mtp and config.num_mtp_layers == 0:
        why = "DSpark drafts are not used" if config.dspark else "num_nextn_predict_layers is 0"
        raise CheckpointError(f"the model has no MTP block to load ({why})")
    per_rank = config.n_routed_experts // coord.world
    experts = range(coord.rank * per_rank, (coord.rank + 1) * per_rank)
    plan = []
    for spec in inventory(config).values():
        if spec.name.startswith("mtp.") and not load_mtp:
            continue
        expert = routed_expert(spec.name)
        if expert is not None and expert not in experts:
            continue
        rows, cols = _spans(config, coord, spec)
        plan.append(WeightSlice(name=spec.name, spec=spec, rows=rows, cols=cols))
    return plan


def routed_expert(name: str) -> int | None:
    """The expert number in the name of a routed expert's tensor, None for any other tensor."""
    _, found, rest = name.partition(".ffn.experts.")
    number = rest.partition(".")[0]
    return int(number) if found and number.isdecimal() else None


def _spans(
    config: DeepSeekV4Config, coord: MeshCoord, spec: TensorSpec
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Rows and columns that the rank holds of one tensor that it does hold."""
    if spec.name == "head.weight":
        size = -(-config.vocab_size // coord.world)
        start = min(coord.rank * size, config.vocab_size)
        return (start, min(start + size, config.vocab_size)), None
    if coord.tp == 1:
        return None, None
    local = spec.name.split(".", 2)[2] if spec.name.count(".") > 2 else ""
    block = FP8_BLOCK if local.endswith(".scale") else 1
    if local == "attn.attn_sink":
        return _share(config.num_attention_heads, coord, 1), None
    if local in ("attn.wq_b.weight", "attn.wq_b.scale"):
        return _share(config.num_attention_heads * config.head_dim, coord, block), None
    if local in ("attn.wo_a.weight", "attn.wo_a.scale"):
        return _share(config.o_groups * config.o_lora_rank, coord, block), None
    if local in ("attn.wo_b.weight", "attn.wo_b.scale"):
        return None, _share(config.o_groups * config.o_lora_rank, coord, block)
    return None, None


def _share(size: int, coord: MeshCoord, block: int) -> tuple[int, int]:
    """This tp rank's part of ``size`` values, in units of ``block`` values, outward to whole blocks."""
    each = size // coord.tp
    start = coord.tp_rank * each
    return start // block, -(-(start + each) // block)


def _specs(config: DeepSeekV4Config) -> Iterator[TensorSpec]:
    dim, vocab = config.hidden_size, config.vocab_size
    yield TensorSpec(name="embed.weight", dtype="BF16", shape=(vocab, dim))
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer, f"layers.{layer}")
    for index in range(config.num_mtp_layers):
        prefix = f"mtp.{index}"
        yield from _block(config, config.num_hidden_layers + index, prefix)
        yield from _fp8(f"{prefix}.e_proj", dim, dim)
        yield from _fp8(f"{prefix}.h_proj", dim, dim)
        for norm in ("enorm", "hnorm", "norm"):
            yield TensorSpec(name=f"{prefix}.{norm}.weight", dtype="BF16", shape=(dim,))
        yield from _hyper(f"{prefix}.hc_head", config.hc_mult, 1, config)
    yield TensorSpec(name="norm.weight", dtype="BF16", shape=(dim,))
    yield from _hyper("hc_head", config.hc_mult, 1, config)
    yield TensorSpec(name="head.weight", dtype="BF16", shape=(vocab, dim))


def _block(config: DeepSeekV4Config, layer: int, prefix: str) -> Iterator[TensorSpec]:
    dim = config.hidden_size
    mixes = (2 + config.hc_mult) * config.hc_mult
    for part in ("attn", "ffn"):
        yield from _hyper(f"{prefix}.hc_{part}", mixes, 3, config)
        yield TensorSpec(name=f"{prefix}.{part}_norm.weight", dtype="BF16", shape=(dim,))
    yield from _attention(config, config.layer_ratio(layer), f"{prefix}.attn")
    yield from _ffn(config, config.is_hash_layer(layer), f"{prefix}.ffn")


def _attention(config: DeepSeekV4Config, ratio: int, prefix: str) -> Iterator[TensorSpec]:
    dim, width, lora = config.hidden_size, config.head_dim, config.q_lora_rank
    heads, out_rows = config.num_attention_heads, config.o_groups * config.o_lora_rank
    yield TensorSpec(name=f"{prefix}.attn_sink", dtype="F32", shape=(heads,))
    yield from _fp8(f"{prefix}.wq_a", lora, dim)
    yield TensorSpec(name=f"{prefix}.q_norm.weight", dtype="BF16", shape=(lora,))
    yield from _fp8(f"{prefix}.wq_b", heads * width, lora)
    yield from _fp8(f"{prefix}.wkv", width, dim)
    yield TensorSpec(name=f"{prefix}.kv_norm.weight", dtype="BF16", shape=(width,))
    yield from _fp8(f"{prefix}.wo_a", out_rows, config.heads_per_group * width)
    yield from _fp8(f"{prefix}.wo_b", dim, out_rows)
    if ratio:
        yield from _compressor(f"{prefix}.compressor", ratio, width, dim)
    if ratio == CSA_RATIO:
        index_rows = config.index_n_heads * config.index_head_dim
        yield from _fp8(f"{prefix}.indexer.wq_b", index_rows, lora)
        yield TensorSpec(
            name=f"{prefix}.indexer.weights_proj.weight",
            dtype="BF16",
            shape=(config.index_n_heads, dim),
        )
        yield from _compressor(f"{prefix}.indexer.compressor", ratio, config.index_head_dim, dim)


def _compressor(prefix: str, ratio: int, width: int, dim: int) -> Iterator[TensorSpec]:
    rows = 2 * width if ratio == CSA_RATIO else width  # CSA groups overlap: two series
    yield TensorSpec(name=f"{prefix}.wkv.weight", dtype="BF16", shape=(rows, dim))
    yield TensorSpec(name=f"{prefix}.wgate.weight", dtype="BF16", shape=(rows, dim))
    yield TensorSpec(name=f"{prefix}.ape", dtype="F32", shape=(ratio, rows))
    yield TensorSpec(name=f"{prefix}.norm.weight", dtype="BF16", shape=(width,))


def _ffn(config: DeepSeekV4Config, hashed: bool, prefix: str) -> Iterator[TensorSpec]:
    dim, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield TensorSpec(name=f"{prefix}.gate.weight", dtype="BF16", shape=(experts, dim))
    if hashed:
        table = (config.vocab_size, config.num_experts_per_tok)
        yield TensorSpec(name=f"{prefix}.gate.tid2eid", dtype="I64", shape=table)
    else:
        yield TensorSpec(name=f"{prefix}.gate.bias", dtype="F32", shape=(experts,))
    expert_format = _fp4 if config.expert_dtype == "fp4" else _fp8
    for expert in range(experts):
        yield from expert_format(f"{prefix}.experts.{expert}.w1", inner, dim)
        yield from expert_format(f"{prefix}.experts.{expert}.w2", dim, inner)
        yield from expert_format(f"{prefix}.experts.{expert}.w3", inner, dim)
    yield from _fp8(f"{prefix}.shared_experts.w1", inner, dim)
    yield from _fp8(f"{prefix}.shared_experts.w2", dim, inner)
    yield from _fp8(f"{prefix}.shared_experts.w3", inner, dim)


def _hyper(prefix: str, mixes: int, scales: int, config: DeepSeekV4Config) -> Iterator[TensorSpec]:
    flat = config.hc_mult * config.hidden_size
    yield TensorSpec(name=f"{prefix}_fn", dtype="F32", shape=(mixes, flat))
    yield TensorSpec(name=f"{prefix}_base", dtype="F32", shape=(mixes,))
    yield TensorSpec(name=f"{prefix}_scale", dtype="F32", shape=(scales,))


def _fp8(prefix: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    blocks = (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
    yield TensorSpec(name=f"{prefix}.weight", dtype="F8_E4M3", shape=(rows, cols))
    yield TensorSpec(name=f"{prefix}.scale", dtype="F8_E8M0", shape=blocks)


def _fp4(prefix: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield TensorSpec(name=f"{prefix}.weight", dtype="I8", shape=(rows, cols // 2))
    yield TensorSpec(name=f"{prefix}.scale", dtype="F8_E8M0", shape=(rows, cols // FP4_BLOCK))


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
