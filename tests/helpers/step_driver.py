"""Drives one rank's Worker with step plans, without an engine: for whole-model tests on any mesh.

Every rank of a mesh runs the same program on its own ``Driver``. What a driver holds besides the
worker (requests, block tables) is the same on all ranks, because outputs are shared after each step.
All caches start poisoned: whatever is read before it was written turns into NaN in the logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import load_entries
from model.cache_spec import LayerCache
from model.parallel.config import MeshCoord, ParallelConfig
from model.parallel.mesh import ParallelMesh, build_mesh
from worker.config import (
    KVCacheConfig,
    ModelSource,
    SchedulerConfig,
    SpeculativeConfig,
    WorkerConfig,
)
from worker.kv_cache import KVCachePool
from worker.protocol import (
    DecodeSlice,
    PrefillSlice,
    SamplingParams,
    SliceOutput,
    SlotInit,
    StepPlan,
    TailOp,
    TailSave,
)
from worker.worker import Worker

VOCAB = 128
POISON = 0xFF  # as bytes: NaN in float32, bfloat16 and float8_e4m3

# Every layer kind, hash and score routing, a selection that leaves entries out, an MTP block. A rank's
# rows of wo_a cut a scale block; 4 heads and 4 groups divide over 4 ranks.
SHAPE: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 4,
    "o_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 32,
    "sliding_window": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "expert_dtype": "fp4",
    "hidden_act": "silu",
    "swiglu_limit": 4.0,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "hc_mult": 4,
    "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def write_shape(folder: Path, **changes: Any) -> str:
    """Write ``SHAPE`` with changes as a config.json; returns its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(SHAPE | changes))
    return str(path)


def stream(number: int, length: int) -> list[int]:
    """The first tokens of an endless random text; a longer length continues a shorter one."""
    return np.random.default_rng(1000 + number).integers(0, VOCAB, 4096)[:length].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to run the model. ``shape`` is a config.json (random weights), ``path`` a checkpoint."""

    shape: str = ""
    path: str = ""
    seed: int = 3
    cp: int = 1
    tp: int = 1
    gather: str = "compressed"
    shard: str = "replicate"
    numerics: str = "fp32"
    dtype: str = "auto"
    block_size: int = 128
    mtp: int = 0
    load_mtp: bool = True
    min_tokens: int = 0
    combine: str = "fast"
    dcp: bool = False
    num_blocks: int = 64
    slots: int = 8
    tails: int = 6
    max_len: int = 2048

    @property
    def name(self) -> str:
        """What differs between the setups of one test."""
        parts = f"cp{self.cp}tp{self.tp}-{self.gather}-{self.shard}-{self.numerics}-{self.combine}"
        return f"{parts}-b{self.block_size}-mtp{self.mtp}-min{self.min_tokens}-dcp{self.dcp:d}"

    def alone(self) -> Setup:
        """The same model on one rank."""
        return replace(self, cp=1, tp=1, shard="replicate", dcp=False)

    def worker_config(self) -> WorkerConfig:
        """As the rank gets it."""
        return WorkerConfig(
            model=ModelSource(
                path=self.path,
                shape=self.shape,
                load_format="safetensors" if self.path else "random",
                numerics=self.numerics,  # type: ignore[arg-type]
                max_model_len=self.max_len,
                seed=self.seed,
            ),
            device="cpu",
            parallel=ParallelConfig(
                cp=self.cp,
                tp=self.tp,
                cp_gather=self.gather,  # type: ignore[arg-type]
                kv_shard=self.shard,  # type: ignore[arg-type]
                cp_min_tokens=self.min_tokens,
                moe_combine=self.combine,  # type: ignore[arg-type]
                dcp=self.dcp,
            ),
            kv_cache=KVCacheConfig(
                dtype=self.dtype,  # type: ignore[arg-type]
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                num_tails=self.tails,
            ),
            scheduler=SchedulerConfig(max_num_seqs=self.slots),
            speculative=SpeculativeConfig(mtp=self.mtp),
            load_mtp=self.load_mtp,
        )


@dataclass(slots=True, kw_only=True)
class Request:
    """One running request: ``tokens`` known so far, ``computed`` of them in the caches."""

    id: int
    slot: int
    tokens: list[int]
    computed: int
    blocks: list[int] = field(default_factory=list)
    announced: int = 0  # blocks the ranks know


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A request's share of a prefill step: its next ``count`` tokens."""

    request: Request
    count: int
    tails: tuple[tuple[int, int], ...] = ()  # (position, tail)
    sample: bool = False
    logits: bool = True
    mtp_logits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A request's share of a decode step: ``forced`` known tokens, or its last one and ``drafts``."""

    request: Request
    forced: int = 0
    drafts: int = 0
    logits: bool = False
    mtp_logits: bool = False


class _Rank(Worker):
    """A worker whose process is already in a process group (tests.helpers.ranks)."""

    def join(self) -> None:
        self._mesh = build_mesh(self.config.parallel, self.coord.rank)


class Driver:
    """One rank and the host-side state of its requests."""

    def __init__(self, setup: Setup, rank: int = 0) -> None:
        self.setup, self.rank = setup, rank
        coord = MeshCoord(cp=setup.cp, tp=setup.tp, rank=rank)
        self.worker = _Rank(setup.worker_config(), coord)
        self.worker.join()
        self.worker.load()
        self.info = self.worker.init_cache()
        self.step_id = self.next_id = 0
        self.free: list[list[int]] = []
        self.inits: list[SlotInit] = []
        self.saves: list[TailOp] = []
        self.reset()

    @property
    def pool(self) -> KVCachePool:
        """The rank's caches."""
        assert self.worker._pool is not None
        return self.worker._pool

    @property
    def mesh(self) -> ParallelMesh:
        """The rank's groups."""
        assert self.worker._mesh is not None
        return self.worker._mesh

    def reset(self) -> None:
        """Poison every cache and free every block; ids are handed out in a scrambled order."""
        for layer in self.pool.layers:
            poison_layer(layer)
        self.pool.streams.fill_(float("nan"))
        self.pool.tail_streams.fill_(float("nan"))
        order = np.random.default_rng(5).permutation(self.info.num_blocks).tolist()
        self.free = [[b for b in order if b % self.setup.cp == s] for s in range(self.setup.cp)]

    def open(
        self,
        tokens: list[int],
        slot: int,
        *,
        prompt: int | None = None,
        start: int = 0,
        tail: int = -1,
        blocks: list[int] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Request:
        """Give a slot to a request, with the next step; ``start``, ``tail``, ``blocks``: a prefix hit."""
        self.next_id += 1
        shared = list(blocks or [])
        request = Request(
            id=self.next_id,
            slot=slot,
            tokens=list(tokens),
            computed=start,
            blocks=shared,
            announced=len(shared),
        )
        self.inits.append(
            SlotInit(
                request_id=request.id,
                slot=slot,
                sampling=sampling or SamplingParams(),
                num_prompt_tokens=len(tokens) if prompt is None else prompt,
                start=start,
                restore_tail=tail,
                block_ids=list(shared),
                history=list(tokens[:start]) if sampling and sampling.needs_history else [],
            )
        )
        return request

    def save_tail(self, request: Request, position: int, tail: int) -> None:
        """Save a tail with the next step, before anything else runs."""
        self.saves.append(TailOp(slot=request.slot, position=position, tail=tail))

    def release(self, request: Request) -> None:
        """Give a request's blocks back; the next request gets them first."""
        for i, block in enumerate(request.blocks):
            self.free[i % self.setup.cp].insert(0, block)
        request.blocks = []

    def prefill(self, *parts: Part) -> list[SliceOutput]:
        """One prefill step; every rank returns rank 0's outputs. A sampled token joins the request."""
        slices = []
        for part in parts:
            r = part.request
            end = r.computed + part.count
            slices.append(
                PrefillSlice(
                    request_id=r.id,
                    slot=r.slot,
                    start=r.computed,
                    token_ids=r.tokens[r.computed : end],
                    next_token=r.tokens[end] if end < len(r.tokens) else -1,
                    block_ids=self._grow(r, end),
                    save_tails=[TailSave(position=p, tail=t) for p, t in part.tails],
                    sample=part.sample,
                    logits=part.logits,
                    mtp_logits=part.mtp_logits,
                )
            )
        outputs = self._execute("prefill", prefill=slices)
        for part, output in zip(parts, outputs, strict=True):
            part.request.computed += part.count
            part.request.tokens.extend(output.token_ids)
        return outputs

    def decode(self, *rows: Row) -> list[SliceOutput]:
        """One decode step; forced rows are teacher-forced, others sample and verify drafts."""
        slices = []
        for row in rows:
            r = row.request
            count = row.forced or 1 + row.drafts
            end = r.computed + count
            known = r.tokens[r.computed : end] if row.forced else []
            slices.append(
                DecodeSlice(
                    request_id=r.id,
                    slot=r.slot,
                    position=r.computed,
                    num_tokens=count,
                    token_ids=known,
                    next_token=r.tokens[end] if row.forced and end < len(r.tokens) else -1,
                    block_ids=self._grow(r, end),
                    logits=row.logits,
                    mtp_logits=row.mtp_logits,
                )
            )
        outputs = self._execute("decode", decode=slices)
        for row, output in zip(rows, outputs, strict=True):
            row.request.computed += row.forced or len(output.token_ids)
            row.request.tokens.extend(output.token_ids)
        return outputs

    def generate(self, request: Request, count: int) -> list[int]:
        """Prefill what is left of a request, then decode with drafts: ``count`` new tokens or more."""
        start = len(request.tokens)
        self.prefill(
            Part(request=request, count=start - request.computed, sample=True, logits=False)
        )
        while len(request.tokens) - start < count:
            self.decode(Row(request=request, drafts=self.drafts(request)))
        return request.tokens[start:]

    def drafts(self, request: Request) -> int:
        """Drafts a request's slot holds."""
        assert self.worker._slots is not None
        slot = self.worker._slots.slots[request.slot]
        assert slot is not None
        return len(slot.drafts)

    def contents(self, request: Request) -> list[dict[str, Tensor]]:
        """What later steps may read of a request, per layer, float32.

        ``window`` [n, d] the last 127 rows or fewer; ``state`` the rows of the previous (CSA) and the
        open group; ``main`` [E, d] and ``index`` [E, di] by entry, NaN where another rank has them.
        """
        return [self._layer_contents(layer, request) for layer in self.pool.layers]

    def _layer_contents(self, layer: LayerCache, request: Request) -> dict[str, Tensor]:
        end, pool = request.computed, self.pool
        window = pool.window_rows(request.slot, np.arange(max(0, end - 127), end))
        found = {"window": _load(layer.window, layer.window_layout, window)}
        if not layer.ratio:
            return found
        back = int(layer.ratio == 4)
        kept = np.arange(max(0, (end // layer.ratio - back) * layer.ratio), end)
        found["state"] = layer.state[
            torch.from_numpy(pool.state_rows(layer.ratio, request.slot, kept))
        ]
        n = self.setup.block_size // layer.ratio
        entries = np.arange(end // layer.ratio)
        blocks = np.array(request.blocks, dtype=np.int64)[entries // n]
        found["main"] = _load(
            layer.main, layer.main_layout, self.owned_page(blocks) * n + entries % n
        )
        found["main"][torch.from_numpy(self.owned_page(blocks) < 0)] = float("nan")
        if layer.ratio == 4:
            found["index"] = _load(layer.index, layer.index_layout, blocks * n + entries % n)
        return found

    def owned_page(self, blocks: np.ndarray) -> np.ndarray:
        """This rank's local main page of each block, large negative where it has none."""
        if self.setup.shard == "replicate":
            return blocks
        cp = self.setup.cp
        return np.where(blocks % cp == self.mesh.coord.cp_rank, blocks // cp, -(1 << 30))

    def close(self) -> None:
        """Drop the tensors; the process group stays."""
        self.worker._runner = self.worker._pool = self.worker._model = None

    def _grow(self, request: Request, end: int) -> list[int]:
        """Blocks for positions below ``end``; returns those the ranks do not know yet."""
        while len(request.blocks) * self.setup.block_size < end:
            shard = len(request.blocks) % self.setup.cp
            request.blocks.append(self.free[shard].pop(0))
        fresh = request.blocks[request.announced :]
        request.announced = len(request.blocks)
        return fresh

    def _execute(self, phase: str, **slices: Any) -> list[SliceOutput]:
        inits, saves, self.inits, self.saves = self.inits, self.saves, [], []
        self.step_id += 1
        plan = StepPlan(step_id=self.step_id, phase=phase, saves=saves, inits=inits, **slices)  # type: ignore[arg-type]
        outputs = self.worker.execute(plan).outputs
        if self.setup.cp * self.setup.tp == 1:
            return outputs
        shared = [outputs]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


def poison_layer(layer: LayerCache) -> None:
    """Fill every cache of a layer with NaN."""
    for f in fields(layer):
        value = getattr(layer, f.name)
        if isinstance(value, Tensor):
            value.fill_(POISON if value.dtype == torch.uint8 else float("nan"))


def poison_slot(pool: KVCachePool, slot: int) -> None:
    """Fill one slot's rings, states and streams with NaN: nobody may have left anything there."""
    for layer in pool.layers:
        layer.window[slot] = POISON
        if layer.ratio:
            rows = pool.spec.state_rows(layer.ratio)
            layer.state[slot * rows : (slot + 1) * rows] = float("nan")
    rows = pool.stream_rows
    pool.streams[slot * rows : (slot + 1) * rows] = float("nan")


def rows_of(data: bytes, width: int = VOCAB) -> Tensor:
    """The logits in an answer, float32 [rows, width]."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(-1, width).copy())


def merged(ranks: list[list[dict[str, Tensor]]], setup: Setup) -> list[dict[str, Tensor]]:
    """One rank's view of all ranks' contents: equal where replicated, each entry once per tp rank."""
    out = []
    for layer in range(len(ranks[0])):
        parts = [contents[layer] for contents in ranks]
        whole = dict(parts[0])
        for name, first in parts[0].items():
            copies = torch.stack([p[name] for p in parts])
            if name == "main" and setup.shard == "cp":
                present = ~copies.isnan().any(-1)
                assert (present.sum(0) == setup.tp).all(), f"layer {layer}: not on one owner each"
                whole[name] = copies.nan_to_num(float("-inf")).amax(0)
            else:
                assert (copies == first).all(), f"layer {layer}: {name} differs between the ranks"
        out.append(whole)
    return out


def _load(pool: Tensor, layout: Any, rows: np.ndarray) -> Tensor:
    return load_entries(pool, layout, torch.from_numpy(np.maximum(rows, 0)), torch.float32)
