"""An engine for one command: checked before anything starts, ended whatever happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.commands.common import say
from cluster.commands.exits import InputError
from cluster.config import ClusterConfig
from cluster.engine import EngineConfig, LLMEngine
from cluster.executors import make_executor
from cluster.tokenizer import Tokenizer
from model.deepseek_v4.config import DeepSeekV4Config
from worker.report import PlatformError, device_memory, inspect_model, memory_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a command serves: the configuration as it will run, the model, the tokenizer if any."""

    config: ClusterConfig
    model: DeepSeekV4Config
    tokenizer: Tokenizer | None
    load_mtp: bool


def prepare(config: ClusterConfig, *, load_mtp: bool = False) -> Served:
    """Check device, model, checkpoint headers, mesh and cache sizes; nothing is started or read.

    Args:
        load_mtp: the MTP block is needed even with ``speculative.mtp`` 0.

    Raises:
        InputError: a device that is not here, or an MTP block that the model does not have.
        CheckpointError: a checkpoint or mesh that cannot be used.
        CapacityError: caches that cannot hold one request.
    """
    try:
        _, memory = device_memory(config.device)
    except PlatformError as err:
        raise InputError(str(err)) from err
    report = inspect_model(config.worker(load_mtp=load_mtp))
    model = report.config
    for note in report.notes:
        say(note)
    if model.num_mtp_layers == 0:
        if load_mtp:
            raise InputError("--mtp: the model has no MTP block to score with")
        if config.speculative.mtp and not model.dspark:
            raise InputError(
                f"speculative.mtp = {config.speculative.mtp}, but the model has no MTP block:"
                " allowed is 0"
            )
        config = replace(config, speculative=replace(config.speculative, mtp=0))
    if memory is None:
        memory_report(config.worker(load_mtp=load_mtp), model)
    path = config.model.path
    tokenizer = Tokenizer.load(Path(path)) if path else None
    return Served(config=config, model=model, tokenizer=tokenizer, load_mtp=load_mtp)


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
