"""An engine for one command: checked before anything starts, ended whatever happens."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.commands.common import check_output_folder, say
from cluster.commands.exits import InputError
from cluster.config import ClusterConfig
from cluster.engine import EngineConfig, LLMEngine
from cluster.errors import RequestError
from cluster.events import ScoreRequest
from cluster.executors import make_executor
from cluster.intake import Intake
from cluster.limits import SchedulerLimits
from cluster.params import GenerationParams
from cluster.tokenizer import Tokenizer
from model.deepseek_v4.config import DeepSeekV4Config
from worker.config import WorkerConfig
from worker.protocol import CacheInfo
from worker.report import PlatformError, device_memory, inspect_model, memory_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a command serves: the configuration as it will run, the model, the tokenizer if any."""

    config: ClusterConfig
    model: DeepSeekV4Config
    tokenizer: Tokenizer | None
    load_mtp: bool
    limits: SchedulerLimits  # on CUDA an upper bound: only the ranks see their free memory

    def check_prompts(self, prompts: Iterable[Sequence[int]], params: GenerationParams) -> None:
        """RequestError now, before anything starts, for what the engine would refuse."""
        intake = self._intake()
        for index, ids in enumerate(prompts):
            try:
                request = intake.generation(index, ids, params, self.limits)
                self.limits.check_fits(request.max_len)
            except RequestError as err:
                raise RequestError(f"request {index}: {err}") from err

    def check_scores(self, requests: Iterable[ScoreRequest]) -> None:
        """RequestError now, before anything starts, for what the engine would refuse."""
        intake = self._intake()
        for index, item in enumerate(requests):
            try:
                self.limits.check_fits(intake.scoring(index, item, self.limits).max_len)
            except RequestError as err:
                raise RequestError(f"request {index}: {err}") from err

    def _intake(self) -> Intake:
        return Intake(
            vocab_size=self.model.vocab_size,
            eos_token_ids=frozenset((self.model.eos_token_id,)),
            seed=0,
            tokenizer=self.tokenizer,
        )


def prepare(config: ClusterConfig, *, load_mtp: bool = False) -> Served:
    """Check device, model, checkpoint headers, mesh and cache sizes; nothing is started or read.

    Args:
        load_mtp: the MTP block is needed even with ``speculative.mtp`` 0.

    Raises:
        InputError: a device that is not here, or an MTP block that the model does not have.
        CheckpointError: a checkpoint or mesh that cannot be used.
        CapacityError: caches that cannot hold one request.
        InputError: a ``cluster.log_dir`` or ``cluster.ray.temp_dir`` that cannot be written.
    """
    try:
        _, memory = device_memory(config.device)
    except PlatformError as err:
        raise InputError(str(err)) from err
    report = inspect_model(config.worker(load_mtp=load_mtp))
    model = report.config
    for note in report.notes:
        say(note)
    if model.num_mtp_layers == 0 and load_mtp:
        raise InputError("--mtp: the model has no MTP block to score with")
    config = settle_drafts(config, model)
    cluster = config.cluster
    if cluster.executor == "local" and cluster.log_dir:
        check_output_folder("cluster.log_dir", Path(cluster.log_dir))
    if cluster.executor == "ray" and cluster.ray.temp_dir and not cluster.ray.address:
        check_output_folder("cluster.ray.temp_dir", Path(cluster.ray.temp_dir))
    path = config.model.path
    return Served(
        config=config,
        model=model,
        tokenizer=Tokenizer.load(Path(path)) if path else None,
        load_mtp=load_mtp,
        limits=_limits(config.worker(load_mtp=load_mtp), model, sized_here=memory is None),
    )


def settle_drafts(config: ClusterConfig, model: DeepSeekV4Config) -> ClusterConfig:
    """The config as it will run: no drafts with a 0731 release, whose drafts are not used.

    Raises:
        InputError: drafts are asked for, and the model has no MTP block.
    """
    drafts = config.speculative.mtp
    if model.num_mtp_layers or not drafts:
        return config
    if not model.dspark:
        raise InputError(
            f"speculative.mtp = {drafts}, but the model has no MTP block: allowed is 0"
        )
    return replace(config, speculative=replace(config.speculative, mtp=0))


def _limits(worker: WorkerConfig, model: DeepSeekV4Config, *, sized_here: bool) -> SchedulerLimits:
    """What the ranks will allocate; where only they can tell, what the config allows at most."""
    kv = worker.kv_cache
    if sized_here:
        size = memory_report(worker, model).size
        blocks, longest, tails = size.num_blocks, size.max_model_len, size.num_tails
    else:
        longest = worker.model.max_model_len or model.max_position_embeddings
        blocks = -(-longest // kv.block_size) if kv.num_blocks == "auto" else kv.num_blocks
        tails = 0
    info = CacheInfo(
        num_blocks=blocks,
        block_size=kv.block_size,
        num_slots=worker.scheduler.max_num_seqs,
        num_tails=tails,
        max_model_len=longest,
        allocated_bytes=0,
        weight_bytes=0,
    )
    return SchedulerLimits.build(worker, info, model.vocab_size)


@contextmanager
def running_engine(served: Served) -> Iterator[LLMEngine]:
    """Start the ranks, hand out the engine, end every process; also after Ctrl-C in the start."""
    config = served.config
    engine = LLMEngine(
        EngineConfig(
            worker=config.worker(load_mtp=served.load_mtp),
            vocab_size=served.model.vocab_size,
            eos_token_ids=(served.model.eos_token_id,),
            max_rebuilds=config.cluster.max_rebuilds,
            rebuild_window_s=config.cluster.rebuild_window_s,
            seed=0,
        ),
        make_executor(config, load_mtp=served.load_mtp),
        served.tokenizer,
        report=say,
    )
    try:
        engine.start()
        yield engine
    finally:
        # A second Ctrl-C must not stop the ranks from being ended.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        engine.shutdown()
        signal.signal(signal.SIGINT, before)
