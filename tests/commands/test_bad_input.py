"""What cannot work is refused in one line before any rank starts; never a traceback, never after the work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.engine import LLMEngine

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--set", f"model.path={ROOT / 'assets' / 'tiny-python'}", "--set", "cluster.executor=local")
GOLDEN = ("--set", f"model.path={ROOT / 'tests' / 'golden' / 'a_swa'}")
PRO = ("--config", str(ROOT / "configs" / "pro_8xh200_2nodes.yaml"), "--set", "model.shape=pro")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    requests = {"ids": [[1, 2, 3]], "uneven": [[1, 2, 3], [1, 2]], "long": [[1], [1] * 600]}
    for name, ids in requests.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"requests": ids}))
    broken = shutil.copytree(ROOT / "tests" / "golden" / "a_swa", tmp_path / "ck")
    (broken / "tokenizer.json").write_text("{}")
    (tmp_path / "nul.yaml").write_bytes(b'model:\n  path: "a"\x00\n')
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 5000 + "]" * 5000)
    return tmp_path


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: LLMEngine) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(LLMEngine, "start", start)


def cases() -> dict[str, tuple[list[str], str]]:
    """Name -> (argv, what the line must hold); ``@`` is the folder of the files."""
    generate = ["generate", "--token-ids", "@/ids.json", *TINY]
    score = ["score", "--input", "@/ids.json", *TINY]
    retrieval = ["eval", "retrieval", *TINY]
    short = ["--set", "model.max_model_len=512"]
    few = ["--set", "kv_cache.num_blocks=2", "--set", "kv_cache.block_size=128"]
    small = ["--set", "kv_cache.cpu_bytes=1048576"]
    return {
        "max tokens": ([*generate, "--max-tokens", "0"], "max_tokens"),
        "temperature": ([*generate, "--temperature", "-1"], "temperature"),
        "not a number": ([*generate, "--temperature", "nan"], "temperature"),
        "seed": ([*generate, "--seed", "-1"], "seed"),
        "empty stop": ([*generate, "--stop", ""], "stop[0]"),
        "stop without text": ([*generate, "--stop", "x", *GOLDEN], "tokenizer"),
        "surrogate": (["generate", "--prompt", "a\udcff", *TINY], "surrogate"),
        "answer too long": ([*generate, *short, "--max-tokens", "510"], "513"),
        "prompt too long": (["generate", "--token-ids", "@/long.json", *TINY, *short], "request 1"),
        "too few blocks": (["generate", "--token-ids", "@/long.json", *TINY, *few], "at most 255"),
        "score too long": (
            ["score", "--input", "@/long.json", "--output", "@/o", *TINY, *few],
            "at most 256",
        ),
        "no room": ([*generate, *small], "1048576 bytes"),
        "log folder": ([*generate, "--set", "cluster.log_dir=@/ids.json"], "cluster.log_dir"),
        "folder of Ray": (
            [*generate, "--set", "cluster.executor=ray"]
            + ["--set", "cluster.ray.temp_dir=@/ids.json"],
            "cluster.ray.temp_dir",
        ),
        "which request": (
            ["score", "--input", "@/uneven.json", "--output", "@/o", "--decode-from", "2", *TINY],
            "request 1: decode_from",
        ),
        "device as output": ([*score, "--output", "/dev/null"], "/dev/null"),
        "endless name": ([*score, "--output", "@/" + "x" * 300], "--output"),
        "no place for output": ([*score, "--output", "@/ids.json/x"], "--output"),
        "file as folder": ([*retrieval, "--output", "@/ids.json"], "--output"),
        "lengths": ([*retrieval, "--lengths", "900000000"], "--lengths 900000000"),
        "lengths of the model": ([*retrieval, *short, "--lengths", "600"], "at most 510"),
        "check without drafts": (
            ["check", *GOLDEN, "--set", "speculative.mtp=1"],
            "speculative.mtp",
        ),
        "check of a tokenizer": (["check", "--set", "model.path=@/ck"], "tokenizer.json"),
        "NUL in YAML": (["check", "--config", "@/nul.yaml"], "not valid YAML"),
        "nested YAML": (["check", "--config", "@/deep.yaml"], "nested too deeply"),
        "endless memory": (["plan", *PRO, "--gib", "inf"], "--gib inf"),
        "GPUs beside the mesh": (["plan", *PRO, "--gpus", "4"], "16 ranks"),
    }


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize("name", cases())
def test_refused_before_the_start(
    name: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, named = cases()[name]
    before = sorted(files.iterdir())
    code = main([word.replace("@", str(files)) for word in argv])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert sorted(files.iterdir()) == before


def test_plan_takes_machines_and_mesh_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ROOT / "assets" / "tiny-python" / "config.json"
    mesh = ["--set", "parallel.cp=2", "--set", "parallel.tp=2", "--set", f"model.shape={shape}"]
    assert main(["plan", *PRO, *mesh]) == 0
    assert "2 node(s) x 2 GPU(s)" in capsys.readouterr().out


@pytest.mark.parametrize("delay_s", [0.5, 1.5])
def test_ctrl_c_while_modules_load(delay_s: float) -> None:
    """Even where SIGINT was ignored by the shell that started us, as for ``launch.py ... &``."""
    command = [sys.executable, str(ROOT / "launch.py"), "generate", "--prompt", "x", *TINY]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    # Python has its handler once ``cluster.cli`` is read: well before torch is.
    deadline = time.monotonic() + 30
    while not _catches_sigint(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in errors


def _catches_sigint(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)
