"""One rank: joins the world, loads its weights, sizes and allocates its caches, runs steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from kernels import CacheDtype, Numerics
from kernels.dispatch import build, without_kernel
from kernels.platform import resolve_device, use_device
from model.cache_spec import CacheSpec
from model.checkpoint.loader import load_weights
from model.checkpoint.source import load_config, open_source
from model.deepseek_v4.model import DeepSeekV4
from model.deepseek_v4.weights import check_mesh, weight_plan
from model.parallel.config import MeshCoord
from model.parallel.mesh import ParallelMesh
from worker.cache_size import plan_cache
from worker.config import WorkerConfig
from worker.cuda_graph import DecodeGraphs, graph_obstacle
from worker.decode_builder import DecodeBuilder
from worker.distributed import join_world, leave_world
from worker.kv_cache import KVCachePool
from worker.model_runner import ModelRunner
from worker.prefill_builder import PrefillBuilder
from worker.prefill_graph import prefill_obstacle
from worker.protocol import CacheInfo, StepOutput, StepPlan
from worker.rehearsal import rehearse
from worker.slots import SlotTable

_LOG = logging.getLogger("causeway.worker")


class Worker:
    """The life of a rank: ``init_distributed``, ``load``, ``init_cache``, ``warm_up``, ``execute`` ...

    Args:
        config: what to run; the same on every rank.
        coord: this rank's place in the mesh.
        device_index: CUDA device of this process, counted within those it can see.
    """

    def __init__(self, config: WorkerConfig, coord: MeshCoord, device_index: int = 0) -> None:
        self.config, self.coord = config, coord
        self.device = resolve_device(config.device, device_index)
        self.numerics = Numerics(config.model.numerics)
        self.weight_bytes = 0
        self._mesh: ParallelMesh | None = None
        self._model: DeepSeekV4 | None = None
        self._pool: KVCachePool | None = None
        self._slots: SlotTable | None = None
        self._info: CacheInfo | None = None
        self._runner: ModelRunner | None = None
        self._walks_experts = False

    def init_distributed(self, init_method: str) -> None:
        """Join the process groups; ``init_method`` is ``tcp://host:port`` of a served store."""
        use_device(self.device)
        # No collective may outlive the engine's own deadline by much: the gang is ended before.
        timeout = 2 * self.config.step_deadline_s + 600
        self._mesh = join_world(
            self.config.parallel, self.coord.rank, init_method, self.device, timeout
        )

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read this rank's slices; ``progress`` gets bytes done and bytes in all.

        Raises:
            CheckpointError: the checkpoint or its config cannot be used.
        """
        source_config = self.config.model
        config = load_config(path=source_config.path, shape=source_config.shape)
        source = open_source(
            config,
            path=source_config.path,
            load_format=source_config.load_format,
            seed=source_config.seed,
            device=self.device,
        )
        config = source.config
        check_mesh(config, self.config.parallel)
        with_mtp = config.num_mtp_layers > 0 and (
            self.config.load_mtp or self.config.speculative.mtp > 0
        )
        weights = load_weights(
            weight_plan(config, self.coord, load_mtp=with_mtp), source, self.device, progress
        )
        self.weight_bytes = weights.nbytes
        self._model = DeepSeekV4(
            config,
            self.config.parallel,
            self.numerics,
            weights,
            self._need_mesh(),
            with_mtp=with_mtp,
            keep_fp4=source_config.keep_fp4,
        )

    def init_cache(self) -> CacheInfo:
        """Size the caches (the smallest rank decides) and allocate them."""
        model, mesh = self._need_model(), self._need_mesh()
        self._walks_experts = self._any_rank_walks_experts()
        with_mtp = model.mtp is not None
        spec = CacheSpec(
            config=model.config,
            dtype=cache_dtype(self.config.kv_cache.dtype, self.numerics),
            block_size=self.config.kv_cache.block_size,
            max_drafts=self.config.speculative.mtp if with_mtp else 0,
            with_mtp=with_mtp,
            parallel=self.config.parallel,
        )
        size = plan_cache(spec, self.config, self.device, mesh.world, self.numerics.dtype)
        self._pool = KVCachePool(
            spec,
            num_blocks=size.num_blocks,
            num_slots=size.num_slots,
            num_tails=size.num_tails,
            device=self.device,
            streams_dtype=self.numerics.dtype,
        )
        if self._pool.nbytes != size.total_bytes:
            raise RuntimeError(
                f"allocated {self._pool.nbytes} cache bytes, planned {size.total_bytes}"
            )
        parallel = self.config.parallel
        self._slots = SlotTable(
            size.num_slots,
            -(-size.max_model_len // spec.block_size) + 1,
            cp=parallel.cp,
            cp_rank=self.coord.cp_rank,
            sharded=parallel.kv_shard == "cp" and parallel.cp > 1,
        )
        prefill_graphs = self.config.prefill_graphs and not self.prefill_obstacle()
        prefill = PrefillBuilder(
            spec,
            parallel,
            self.coord,
            self._pool,
            self._slots,
            self.device,
            pad_tables=prefill_graphs,
        )
        decode = DecodeBuilder(spec, self._pool, self._slots, self.device)
        self._runner = ModelRunner(
            model,
            self._pool,
            self._slots,
            prefill,
            decode,
            mesh,
            num_drafts=spec.max_drafts,
            graphs=self.config.cuda_graphs and not self.graph_obstacle(),
            prefill_graphs=prefill_graphs,
        )
        self._info = CacheInfo(
            num_blocks=size.num_blocks,
            block_size=spec.block_size,
            num_slots=size.num_slots,
            num_tails=size.num_tails,
            max_model_len=size.max_model_len,
            allocated_bytes=self._pool.nbytes,
            weight_bytes=self.weight_bytes,
        )
        return self._info

    def graph_obstacle(self) -> str:
        """Why decode steps run without CUDA graphs here; empty when nothing is in the way."""
        model = self._need_model()
        return graph_obstacle(
            model.config,
            self.numerics,
            self.config.parallel,
            self.device,
            pages=cache_dtype(self.config.kv_cache.dtype, self.numerics),
            walks_experts=self._walks_experts,
        )

    def _any_rank_walks_experts(self) -> bool:
        """Whether some rank's experts have no stacked form: ranks that disagreed on graphs would part ways.

        Each rank names its layers: slow steps must not come unannounced.
        """
        blocks = self._need_model().blocks
        layers = [number for number, block in enumerate(blocks) if block.ffn.walks_experts]
        if layers and self.device.type == "cuda" and self.numerics is Numerics.RELEASE:
            why = "FP8 does not hold their values, or their sizes are no multiples of 16"
            _LOG.warning("experts of layers %s run one after the other: %s", layers, why)
        walks = torch.tensor([float(bool(layers))], device=self.device)
        return bool(self._need_mesh().world.all_reduce(walks, "max").item())

    def prefill_obstacle(self) -> str:
        """Why prefill steps run without CUDA graphs here; empty when nothing is in the way."""
        return prefill_obstacle(
            self.config.parallel,
            decode_obstacle=self.graph_obstacle(),
            waits_for_host=any(block.ffn.waits_for_host for block in self._need_model().blocks),
        )

    def warm_up(self) -> None:
        """Compile the ops' kernels, rehearse steps on a GPU, then wait until every rank is here.

        Rank 0 names the ops that have no kernel for this GPU (their torch twins run, slowly), and what
        keeps steps out of CUDA graphs.
        """
        build(self.device)
        speaks = self.coord.rank == 0
        gaps = without_kernel(self.device) if speaks else []
        if gaps:
            _LOG.warning("no GPU implementation, the torch twin runs: %s", ", ".join(gaps))
        if self.device.type == "cuda":
            if speaks:
                self._name_launched_steps()
            self._rehearse()
        self._need_mesh().world.barrier()

    def _name_launched_steps(self) -> None:
        """Say which steps run without CUDA graphs although they are wanted, and why."""
        decode, prefill = self.graph_obstacle(), self.prefill_obstacle()
        if self.config.cuda_graphs and decode:
            _LOG.warning("decode steps run without CUDA graphs: %s", decode)
        if self.config.prefill_graphs and prefill and prefill != decode:
            _LOG.warning("prefill steps run without CUDA graphs: %s", prefill)

    def _rehearse(self) -> None:
        info, slots, runner = self._info, self._slots, self._runner
        if info is None or slots is None or runner is None:
            raise RuntimeError("warm_up before init_cache")
        rehearse(
            self.execute,
            num_slots=info.num_slots,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_model_len=info.max_model_len,
            max_batched_tokens=self.config.scheduler.max_batched_tokens,
            num_drafts=runner.num_drafts,
            batches=DecodeGraphs.batches(info.num_slots) if runner.graphs is not None else [1],
            num_tails=info.num_tails if self.config.scheduler.prefix_cache else 0,
            tail_interval=self.config.kv_cache.tail_interval,
            prefill_graphs=runner.prefill_graphs is not None,
        )
        slots.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step; all ranks get the same plan, rank 0's output counts."""
        begin = time.perf_counter()
        pool, slots, runner = self._pool, self._slots, self._runner
        if pool is None or slots is None or runner is None:
            raise RuntimeError("execute before init_cache")
        for save in plan.saves:
            pool.save_tail(save.slot, save.position, save.tail)
        for init in plan.inits:
            slots.open(init)
            if init.restore_tail >= 0:
                pool.restore_tail(init.slot, init.start, init.restore_tail)
        if plan.phase == "prefill":
            outputs = runner.prefill(plan.prefill)
        else:
            outputs = runner.decode(plan.decode)
        return StepOutput(
            step_id=plan.step_id,
            rank=self.coord.rank,
            outputs=outputs,
            seconds=time.perf_counter() - begin,
        )

    @property
    def vocab_size(self) -> int:
        """Token ids of the loaded model."""
        return self._need_model().config.vocab_size

    def close(self) -> None:
        """Leave the process groups and drop the tensors."""
        if self._runner is not None:
            self._runner.close()  # before the process groups: see there
        self._runner = self._pool = self._model = None
        leave_world()

    def _need_mesh(self) -> ParallelMesh:
        if self._mesh is None:
            raise RuntimeError("init_distributed comes first")
        return self._mesh

    def _need_model(self) -> DeepSeekV4:
        if self._model is None:
            raise RuntimeError("load comes first")
        return self._model


def cache_dtype(choice: str, numerics: Numerics) -> CacheDtype:
    """``kv_cache.dtype``; ``auto`` follows the numerics: fp8 pages for release, else fp32."""
    if choice != "auto":
        return CacheDtype(choice)
    return CacheDtype.FP8 if numerics is Numerics.RELEASE else CacheDtype.FP32
