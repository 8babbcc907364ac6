"""Config files and ``--set``: what is accepted, and that every error names place, key and remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from cluster.config import ClusterConfig, Failpoint, dump, leaves, load_config
from cluster.config_reference import MEANINGS, reference_page
from cluster.errors import ConfigError
from worker.config import WorkerConfig

CONFIGS = ("tiny_cpu_cp2.yaml", "flash_4xh200.yaml", "pro_8xh200_2nodes.yaml")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), [])
    return str(error.value)


def refused_set(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, list(overrides))
    return str(error.value)


def test_defaults_and_empty_files(tmp_path: Path) -> None:
    assert load_config(None, []) == ClusterConfig()
    assert load_config(write(tmp_path, "# nothing\n"), []) == ClusterConfig()
    assert load_config(write(tmp_path, "model:\n  # path: x\ncluster:\n"), []) == ClusterConfig()
    assert ClusterConfig().cluster.executor == "ray"
    assert ClusterConfig().cluster.max_rebuilds == 3


def test_values_reach_their_fields(tmp_path: Path) -> None:
    text = """
model: {path: /data/v4, max_model_len: 900_000}
device: cpu
parallel: {cp: 4, tp: 2, dcp: true, kv_shard: cp}
kv_cache:
  num_blocks: auto
  memory_fraction: 1e-1
cluster:
  nodes: 1
  ray: {address: ""}
  step_deadline_s: 5
  failpoints:
    - {kind: crash, rank: 7, step: 3}
"""
    config = load_config(write(tmp_path, text), [])
    assert config.model.path == "/data/v4"
    assert config.model.max_model_len == 900_000
    assert (config.parallel.cp, config.parallel.tp, config.parallel.dcp) == (4, 2, True)
    assert config.parallel.kv_shard == "cp"
    assert config.kv_cache.num_blocks == "auto"
    assert config.kv_cache.memory_fraction == 0.1
    assert config.cluster.step_deadline_s == 5.0
    assert isinstance(config.cluster.step_deadline_s, float)
    assert config.cluster.failpoints == (Failpoint(kind="crash", rank=7, step=3),)


def test_set_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "parallel:\n  cp: 2\n  tp: 2\nkv_cache: {num_blocks: 7}\n")
    config = load_config(
        path,
        [
            "parallel.cp=4",
            "parallel.cp=8",
            "kv_cache.num_blocks=auto",
            "model.path=/a/b=c",
            "scheduler={max_num_seqs: 3, prefix_cache: false}",
            'model.shape="123"',
        ],
    )
    assert (config.parallel.cp, config.parallel.tp) == (8, 2)
    assert config.kv_cache.num_blocks == "auto"
    assert config.model.path == "/a/b=c"
    assert config.model.shape == "123"
    assert config.scheduler.max_num_seqs == 3
    assert config.scheduler.prefix_cache is False
    assert load_config(None, ["model.path="]).model.path == ""


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("model:\n  pth: x\n", 2, ["model.pth", "did you mean model.path?"]),
        ("paralel: {}\n", 1, ["unknown key paralel", "did you mean parallel?"]),
        ("\n\nzzz: 1\n", 3, ["unknown key zzz", "kv_cache"]),
        ("parallel:\n  cp: 2\n  tp: 1\n  cp: 4\n", 4, ["cp is there twice", "line 2"]),
        ("device: cpu\ndevice: cuda\n", 2, ["device is there twice"]),
        ("parallel:\n  cp: two\n", 2, ["parallel.cp must be integer", "the text 'two'"]),
        ("parallel:\n  cp: true\n", 2, ["parallel.cp must be integer", "'true'"]),
        ('parallel:\n  cp: "2"\n', 2, ["parallel.cp must be integer", "the text '2'"]),
        ("parallel:\n  cp: 2.0\n", 2, ["parallel.cp must be integer"]),
        ("parallel:\n  cp: 010\n", 2, ["parallel.cp must be integer"]),
        ("parallel:\n  cp:\n", 2, ["parallel.cp must be integer", "nothing"]),
        ("parallel:\n  cp: [1]\n", 2, ["parallel.cp must be integer", "a list"]),
        ("parallel:\n  cp: 0\n", 2, ["parallel.cp must be at least 1", "got 0"]),
        ("parallel:\n  dcp: yes\n", 2, ["parallel.dcp must be true | false"]),
        ("parallel:\n  cp_gather: packed\n", 2, ["kv_bf16 | compressed", "'packed'"]),
        ("parallel: 3\n", 1, ["parallel must be a mapping", "'3'"]),
        ("model:\n  path: 123\n", 2, ["model.path must be text", "in quotes"]),
        ("kv_cache:\n  num_blocks: many\n", 2, ["integer | auto", "'many'"]),
        ("kv_cache:\n  num_blocks: 0\n", 2, ["at least 1"]),
        ("kv_cache:\n  block_size: 192\n", 2, ["multiple of 128", "192"]),
        ("kv_cache:\n  memory_fraction: .nan\n", 2, ["must be number"]),
        ("speculative:\n  mtp: 4\n", 2, ["speculative.mtp", "at most 3", "got 4"]),
        ("scheduler:\n  max_batched_tokens: 0\n", 2, ["at least 1"]),
        ("cluster:\n  ray:\n    adress: x\n", 3, ["did you mean cluster.ray.address?"]),
        ("cluster:\n  executor: local\n  ray: {address: a:1}\n", 3, ["executor is local"]),
        ("cluster:\n  ray: {address: ray://a:1}\n", 2, ["Ray client"]),
        ("cluster:\n  nodes: 3\n", 2, ["must divide", "= 1"]),
        ("cluster:\n  heartbeat_timeout_s: 1\n", 2, ["twice cluster.heartbeat_s"]),
        ("cluster:\n  failpoints: crash\n", 2, ["list of"]),
        ("cluster:\n  failpoints: [{kind: crash}]\n", 2, ["lacks rank, step"]),
        ("cluster:\n  failpoints: [{kind: x, rank: 0, step: 1}]\n", 2, ["crash | hang"]),
        ("cluster:\n  failpoints: [{kind: hang, rank: 5, step: 1}]\n", 2, ["rank 5"]),
        ("cluster:\n  failpoints: [{kind: hang, rank: 0, step: -1}]\n", 2, ["at least 0"]),
        ("? [a, b]\n: 1\n", 1, ["must be a word"]),
        ("model: {path: x\n", 2, ["not valid YAML"]),
        ("a: b: c\n", 1, ["not valid YAML"]),
        ("- 1\n", 1, ["the config must be a mapping", "a list"]),
        ("model: !!python/object/apply:os.system [id]\n", 1, ["model must be a mapping"]),
        ("model:\n  <<: {path: x}\n", 2, ["unknown key model.<<"]),
    ],
)
def test_refusals_name_file_line_and_key(
    tmp_path: Path, text: str, line: int, parts: list[str]
) -> None:
    message = refusal(tmp_path, text)
    assert f"run.yaml:{line}: " in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("parallel.cp=zwei", ["parallel.cp must be integer", "'zwei'"]),
        ("parallel.cpp=2", ["unknown key parallel.cpp", "did you mean parallel.cp?"]),
        ("paralell.cp=2", ["did you mean parallel?"]),
        ("parallel.cp.x=2", ["parallel.cp is a value"]),
        ("parallel.cp", ["KEY=VALUE"]),
        (".cp=2", ["KEY=VALUE"]),
        ("parallel=2", ["parallel must be a mapping"]),
        ("parallel.cp=", ["parallel.cp must be integer"]),
        ("kv_cache.block_size=100", ["at least 128"]),
        ("kv_cache.block_size=130", ["multiple of 128"]),
        ("cluster.failpoints={", ["not valid YAML"]),
        ("speculative.mtp=4", ["at most 3"]),
    ],
)
def test_refused_overrides_are_named(override: str, parts: list[str]) -> None:
    message = refused_set("device=cpu", override)
    assert message.startswith(f"--set {override}: ")
    for part in parts:
        assert part in message


def test_checks_across_keys_name_the_later_place(tmp_path: Path) -> None:
    path = write(tmp_path, "cluster:\n  nodes: 2\n  ray: {address: auto}\nparallel: {cp: 4}\n")
    assert load_config(path, []).cluster.nodes == 2
    with pytest.raises(ConfigError, match=r"run.yaml:2: cluster.nodes must divide .* = 3, got 2"):
        load_config(path, ["parallel.cp=3"])
    assert "--set cluster.nodes=2: " in refused_set("parallel.cp=2", "cluster.nodes=2")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml", [])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(binary, [])
    large = tmp_path / "large.yaml"
    large.write_text("# " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="at most"):
        load_config(large, [])
    control = tmp_path / "control.yaml"
    control.write_text("model: {path: a\x07b}\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(control, [])


def test_dump_reads_back_to_the_same(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "model.path='yes'",
            "parallel.cp=2",
            "kv_cache.num_blocks=9",
            "cluster.rebuild_window_s=1e3",
            "cluster.failpoints=[{kind: slow, rank: 1, step: 2, seconds: 0.5}]",
        ],
    )
    assert load_config(write(tmp_path, dump(config)), []) == config


def test_worker_config_survives_the_wire() -> None:
    config = load_config(None, ["parallel.cp=2", "kv_cache.num_blocks=9", "model.path=/x"])
    worker = config.worker(load_mtp=True)
    assert worker.load_mtp
    assert worker.step_deadline_s == config.cluster.deadline_s(config.scheduler.max_batched_tokens)
    assert worker.step_deadline_s > config.cluster.step_deadline_s
    data = msgspec.msgpack.encode(worker)
    assert msgspec.msgpack.decode(data, type=WorkerConfig) == worker
    assert not config.worker().load_mtp


def test_every_worker_key_is_in_the_file() -> None:
    """A section added to WorkerConfig must be reachable from YAML."""
    own = {field.name for field in dataclasses.fields(ClusterConfig)}
    derived = {"load_mtp", "step_deadline_s"}
    assert {field.name for field in dataclasses.fields(WorkerConfig)} - derived <= own


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs(repo_root: Path, name: str) -> None:
    config = load_config(repo_root / "configs" / name, ["model.path=DIR"])
    assert config.model.path == "DIR"
    assert config.cluster.executor == "ray"


def test_tiny_config_is_what_the_issue_asks(repo_root: Path) -> None:
    config = load_config(repo_root / "configs" / "tiny_cpu_cp2.yaml", ["model.path=DIR"])
    assert (config.device, config.parallel.cp, config.parallel.tp) == ("cpu", 2, 1)


def test_reference_page_is_current(repo_root: Path) -> None:
    page = (repo_root / "configs" / "README.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: python -m cluster.config_reference > configs/README.md"
    assert set(MEANINGS) == set(leaves())
    for name in CONFIGS:
        assert f"`{name}`" in page
