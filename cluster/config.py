"""One YAML file plus ``--set`` overrides -> one frozen ``ClusterConfig``.

Every section's dataclass lives with the code that reads it; here they are composed, ranges and
combinations that need no model are checked, and the result can be printed as YAML again. What depends
on the model's shape (heads % tp, for example) is checked where the shape is known.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from cluster.config_nodes import Origin, Value, compose, describe_type, field_type, read_section
from cluster.errors import ConfigError
from model.parallel.config import ParallelConfig
from worker.config import (
    KVCacheConfig,
    ModelSource,
    SchedulerConfig,
    SpeculativeConfig,
    WorkerConfig,
)

MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Failpoint:
    """A fault that a rank brings upon itself at a step: for tests and for rehearsals."""

    kind: Literal["crash", "hang", "slow", "error"]
    rank: int
    step: int  # step_id
    seconds: float = 1.0  # of slow
    generation: int = 0  # which life of the gang: 0 the first start, 1 after a rebuild; -1 every


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """``cluster.ray.*``."""

    address: str = ""  # of a running Ray; empty: start one on this machine and end it with us
    temp_dir: str = ""  # of the Ray we start; empty: a new one, removed at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSection:
    """``cluster.*``: who runs the ranks, and how long anything may take."""

    executor: Literal["ray", "local"] = "ray"
    nodes: int = 1
    ray: RayConfig = field(default_factory=RayConfig)
    max_rebuilds: int = 3
    rebuild_window_s: float = 600.0
    start_deadline_s: float = 1800.0
    step_deadline_s: float = 60.0
    prefill_deadline_s_per_1k: float = 20.0
    heartbeat_s: float = 1.0
    heartbeat_timeout_s: float = 15.0
    max_message_bytes: int = 1 << 30
    log_dir: str = ""
    failpoints: tuple[Failpoint, ...] = ()

    def deadline_s(self, prefill_tokens: int) -> float:
        """Seconds a step with that many prompt tokens may take."""
        return self.step_deadline_s + self.prefill_deadline_s_per_1k * prefill_tokens / 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The whole configuration of one world."""

    model: ModelSource = field(default_factory=ModelSource)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv_cache: KVCacheConfig = field(default_factory=KVCacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    cuda_graphs: bool = True
    prefill_graphs: bool = True
    cluster: ClusterSection = field(default_factory=ClusterSection)

    def worker(self, *, load_mtp: bool = False) -> WorkerConfig:
        """What every rank is built from; a collective may take as long as the longest step."""
        return WorkerConfig(
            model=self.model,
            device=self.device,
            parallel=self.parallel,
            kv_cache=self.kv_cache,
            scheduler=self.scheduler,
            speculative=self.speculative,
            cuda_graphs=self.cuda_graphs,
            prefill_graphs=self.prefill_graphs,
            load_mtp=load_mtp,
            step_deadline_s=self.cluster.deadline_s(self.scheduler.max_batched_tokens),
        )


# Smallest and largest value of every number; None: no bound. A list's items are checked as key[].sub.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "model.max_model_len": (0, 1 << 30),
    "model.seed": (0, (1 << 63) - 1),
    "parallel.cp": (1, 1024),
    "parallel.tp": (1, 1024),
    "parallel.cp_min_tokens": (0, None),
    "kv_cache.block_size": (128, 1 << 16),
    "kv_cache.num_blocks": (1, None),
    "kv_cache.tail_interval": (1, None),
    "kv_cache.num_tails": (0, None),
    "kv_cache.memory_fraction": (0.05, 1.0),
    "kv_cache.cpu_bytes": (1 << 20, None),
    "scheduler.max_batched_tokens": (1, 1 << 24),
    "scheduler.max_num_seqs": (1, 1 << 16),
    "speculative.mtp": (0, 3),
    "cluster.nodes": (1, 1024),
    "cluster.max_rebuilds": (0, None),
    "cluster.rebuild_window_s": (1, None),
    "cluster.start_deadline_s": (1, None),
    "cluster.step_deadline_s": (0.1, None),
    "cluster.prefill_deadline_s_per_1k": (0, None),
    "cluster.heartbeat_s": (0.05, 60),
    "cluster.heartbeat_timeout_s": (0.2, None),
    "cluster.max_message_bytes": (1 << 20, (1 << 32) - 1),
    "cluster.failpoints[].rank": (0, None),
    "cluster.failpoints[].step": (0, None),
    "cluster.failpoints[].seconds": (0, None),
    "cluster.failpoints[].generation": (-1, None),
}


def load_config(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> ClusterConfig:
    """Read a YAML file (None: defaults only), then apply ``a.b=c`` overrides in their order.

    Raises:
        ConfigError: names file and line (or the ``--set``), the key, the value and what is allowed.
    """
    values: dict[str, Value] = {}
    if path is not None:
        origin = Origin(str(path), is_file=True)
        node = compose(_read(path), origin)
        if node is not None:
            values.update(read_section(node, ClusterConfig, origin))
    for override in overrides:
        values.update(_read_override(override))
    config: ClusterConfig = _build(ClusterConfig, values, "")
    _check(config, values)
    return config


def dump(config: ClusterConfig) -> str:
    """The merged config as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, default_flow_style=False)


def leaves(section: type[Any] = ClusterConfig, prefix: str = "") -> dict[str, tuple[str, Any]]:
    """Every key -> (type in words, default), in the order of the file."""
    found: dict[str, tuple[str, Any]] = {}
    for item in dataclasses.fields(section):
        annotation = field_type(section, item.name, "", prefix)
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            found.update(leaves(annotation, f"{key}."))
        else:
            found[key] = (describe_type(annotation), item.default)
    return found


def describe_range(key: str) -> str:
    """The range of a number in words; empty when it has none."""
    low, high = RANGES.get(key, (None, None))
    parts = [f"at least {low}"] if low is not None else []
    parts += [f"at most {high}"] if high is not None else []
    return " and ".join(parts)


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {size} bytes, a config has at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _read_override(override: str) -> dict[str, Value]:
    origin = Origin(f"--set {override}", is_file=False)
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{origin.label}: must be KEY=VALUE with a dotted key, as parallel.cp=2")
    annotation: Any = ClusterConfig
    prefix = ""
    for depth, name in enumerate(names):
        if not dataclasses.is_dataclass(annotation):
            parent = ".".join(names[:depth])
            raise ConfigError(f"{origin.label}: {parent} is a value, it has no key {name}")
        annotation = field_type(annotation, name, f"{origin.label}: ", prefix)  # type: ignore[arg-type]
        prefix += f"{name}."
    # The whole path is composed as YAML, so that one reader serves files and overrides.
    node = compose(text if text.strip() else '""', origin)
    if node is None:
        raise ConfigError(f"{origin.label}: {key} has no value")
    for name in reversed(names):
        word = yaml.ScalarNode("tag:yaml.org,2002:str", name, node.start_mark, node.end_mark)
        node = yaml.MappingNode(
            "tag:yaml.org,2002:map", [(word, node)], node.start_mark, node.end_mark
        )
    return dict(read_section(node, ClusterConfig, origin))


def _build(section: type[Any], values: dict[str, Value], prefix: str) -> Any:
    given: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        annotation = field_type(section, item.name, "", prefix)
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            given[item.name] = _build(annotation, values, f"{key}.")
        elif key in values:
            given[item.name] = values[key].value
    return section(**given)


def _check(config: ClusterConfig, values: dict[str, Value]) -> None:
    def refuse(key: str, text: str) -> ConfigError:
        where = f"{values[key].where}: " if key in values else ""
        return ConfigError(f"{where}{key} {text}")

    for key, found in values.items():
        for name, number in _numbers(key, found.value):
            low, high = RANGES.get(name, (None, None))
            if (low is not None and number < low) or (high is not None and number > high):
                raise refuse(key, f"must be {describe_range(name)}, got {number}")
    if config.kv_cache.block_size % 128:
        raise refuse(
            "kv_cache.block_size", f"must be a multiple of 128, got {config.kv_cache.block_size}"
        )
    cluster, world = config.cluster, config.parallel.world
    if world % cluster.nodes:
        raise refuse(
            "cluster.nodes",
            f"must divide parallel.cp * parallel.tp = {world}, got {cluster.nodes}",
        )
    if cluster.executor == "local" and cluster.nodes > 1:
        raise refuse("cluster.nodes", f"must be 1 with cluster.executor local, got {cluster.nodes}")
    if cluster.executor == "local" and cluster.ray.address:
        raise refuse("cluster.ray.address", "is set, but cluster.executor is local")
    if cluster.ray.address.startswith("ray://"):
        raise refuse("cluster.ray.address", "must be host:port of Ray itself, not of a Ray client")
    if cluster.nodes > 1 and not cluster.ray.address:
        raise refuse("cluster.nodes", f"{cluster.nodes} needs cluster.ray.address of a running Ray")
    if cluster.heartbeat_timeout_s < 2 * cluster.heartbeat_s:
        raise refuse(
            "cluster.heartbeat_timeout_s",
            f"must be at least twice cluster.heartbeat_s ({cluster.heartbeat_s}), "
            f"got {cluster.heartbeat_timeout_s}",
        )
    for failpoint in cluster.failpoints:
        if failpoint.rank >= world:
            raise refuse(
                "cluster.failpoints", f"name rank {failpoint.rank}, the world has {world} ranks"
            )


def _numbers(key: str, value: Any) -> list[tuple[str, float]]:
    """(name in RANGES, number) of every number in a value."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [(key, value)]
    if isinstance(value, tuple):
        return [pair for item in value for pair in _numbers(f"{key}[]", item)]
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
        return [p for name in names for p in _numbers(f"{key}.{name}", getattr(value, name))]
    return []
