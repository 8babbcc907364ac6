"""The frame of ``launch.py``: exit codes, what goes where, bad input of every verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import VERBS, main
from cluster.commands.common import read_token_file
from cluster.commands.exits import InputError, exit_code
from cluster.errors import CapacityError, ConfigError, EngineDead, RequestError, WorkerFailure
from model.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def launch(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False
    )


def test_help_lists_every_verb_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "usage: launch.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["generat"],
        ["generate"],
        ["generate", "--prompt", "x", "--token-ids", "y.json"],
        ["generate", "--prompt", "x", "--max-tokens", "many"],
        ["score", "--input", "x.json"],
        ["eval"],
        ["eval", "retrieval", "--lengths", "12,x"],
        ["eval", "retrieval", "--lengths", "0"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_exit_2_on_stderr(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: launch.py" in captured.err


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (argv, what the message must name)."""
    empty = folder / "empty.json"
    empty.write_text("[]")
    ids = folder / "ids.json"
    ids.write_text("[1, 2, 3]")
    huge = folder / "huge.json"
    huge.write_text("[1, 5000]")
    words = folder / "words.json"
    words.write_text('["a"]')
    out = str(folder / "out.safetensors")
    tiny = f"model.path={ROOT / 'assets' / 'tiny-python'}"
    return {
        "no model": (["check"], "model.path"),
        "no such model": (["check", "--set", f"model.path={folder / 'nothing'}"], "nothing"),
        "unknown key": (["check", "--set", "parallel.cpp=2"], "parallel.cp?"),
        "bad value": (["check", "--set", "parallel.cp=two"], "parallel.cp"),
        "no config": (["check", "--config", str(folder / "no.yaml")], "no.yaml"),
        "bad mesh": (["check", "--set", tiny, "--set", "parallel.tp=3"], "tp 3"),
        "no cuda": (["check", "--set", tiny, "--set", "device=cuda"], "cuda"),
        "too small": (
            ["check", "--set", tiny, "--set", "kv_cache.num_blocks=1"]
            + ["--set", "model.max_model_len=4096"],
            "4096",
        ),
        "empty file": (["generate", "--token-ids", str(empty), "--set", tiny], "empty.json"),
        "no file": (["generate", "--token-ids", str(folder / "x.json"), "--set", tiny], "x.json"),
        "not ids": (["generate", "--token-ids", str(words), "--set", tiny], "words.json"),
        "not in vocabulary": (["generate", "--token-ids", str(huge), "--set", tiny], "5000"),
        "chat without text": (
            ["generate", "--token-ids", str(ids), "--chat", "--set", tiny],
            "--chat",
        ),
        "no tokenizer": (
            ["generate", "--prompt", "x", "--set", "model.load_format=random"]
            + ["--set", f"model.shape={ROOT / 'assets' / 'tiny-python' / 'config.json'}"],
            "tokenizer",
        ),
        "split too late": (
            ["score", "--input", str(ids), "--output", out, "--decode-from", "3", "--set", tiny],
            "decode_from",
        ),
        "split too early": (
            ["score", "--input", str(ids), "--output", out, "--decode-from", "0", "--set", tiny],
            "decode_from",
        ),
        "no output folder": (
            ["score", "--input", str(ids), "--output", str(folder / "no" / "x"), "--set", tiny],
            "--output",
        ),
        "score beyond vocabulary": (
            ["score", "--input", str(huge), "--output", out, "--set", tiny],
            "5000",
        ),
        "no mtp": (
            ["score", "--mtp", "--input", str(ids), "--output", out]
            + ["--set", f"model.path={ROOT / 'tests' / 'golden' / 'e_hash'}"],
            "MTP",
        ),
        "drafts without mtp": (
            ["generate", "--token-ids", str(ids), "--set", "speculative.mtp=1"]
            + ["--set", f"model.path={ROOT / 'tests' / 'golden' / 'e_hash'}"],
            "speculative.mtp",
        ),
        "plan without a shape": (["plan"], "model.shape"),
        "plan of no machine": (["plan", "--set", "model.shape=flash", "--gpus", "0"], "--gpus"),
        "plan of another mesh": (
            ["plan", "--set", "model.shape=flash", "--set", "parallel.cp=2", "--gpus", "4"],
            "parallel.cp 2",
        ),
        "plan too small": (["plan", "--set", "model.shape=flash", "--gib", "20"], "tokens"),
        "tiny from nothing": (
            ["make-tiny", "--output", str(folder / "t"), "--shape", str(folder / "s.json")],
            "s.json",
        ),
        "tiny seed": (["make-tiny", "--output", str(folder / "t"), "--seed", "-1"], "--seed"),
        "no words": (
            ["eval", "retrieval", "--words", str(folder / "w.json"), "--set", tiny],
            "w.json",
        ),
        "nothing fits": (
            ["eval", "retrieval", "--lengths", "20", "--distances", "400", "--set", tiny],
            "400",
        ),
    }


def test_bad_input_is_exit_2_with_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for name, (argv, named) in bad_inputs(tmp_path).items():
        code = main(argv)
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        if code != 2 or len(errors) != 1 or named not in errors[0] or captured.out:
            wrong.append(f"{name}: exit {code}, stdout {captured.out!r}, stderr {captured.err!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (RequestError("x"), 2),
        (CheckpointError("x"), 2),
        (InputError("x"), 2),
        (WorkerFailure(1, "step", 3, "gone"), 1),
        (EngineDead("x"), 1),
        (CapacityError("x"), 1),
        (OSError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_an_error_of_ours_keeps_its_traceback() -> None:
    assert exit_code(KeyError("x")) not in (0, 1, 2, 130)


def test_works_from_another_directory(tmp_path: Path) -> None:
    done = launch("make-tiny", "--output", "t", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t" / "tokenizer.json").is_file()
    assert "config.json" in done.stdout
    assert done.stderr == ""


def test_stdout_may_be_closed() -> None:
    """``launch.py check | head -1`` ends without a traceback."""
    tiny = f"model.path={ROOT / 'assets' / 'tiny-python'}"
    command = [sys.executable, str(ROOT / "launch.py"), "check", "--set", tiny]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.wait(60)
    assert "Traceback" not in errors


class TestTokenFiles:
    @pytest.mark.parametrize(
        ("text", "requests"),
        [
            ("[1, 2]", [[1, 2]]),
            ('{"requests": [[1], [2, 3]]}', [[1], [2, 3]]),
            ("[[1], [2]]", [[1], [2]]),
        ],
    )
    def test_forms(self, tmp_path: Path, text: str, requests: list[list[int]]) -> None:
        path = tmp_path / "ids.json"
        path.write_text(text)
        assert read_token_file(path) == requests

    @pytest.mark.parametrize(
        "raw",
        [
            [],
            {},
            {"requests": []},
            {"requests": [[]]},
            {"requests": [1]},
            {"requests": [[1]], "other": 1},
            [True],
            [1.5],
            [-1],
            [None],
            [[1], []],
            "ids",
            7,
        ],
        ids=json.dumps,
    )
    def test_bad_structures(self, tmp_path: Path, raw: object) -> None:
        path = tmp_path / "ids.json"
        path.write_text(json.dumps(raw))
        with pytest.raises(InputError, match=r"ids\.json"):
            read_token_file(path)

    @pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
    def test_not_json(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "ids.json"
        path.write_bytes(data)
        with pytest.raises(InputError, match="not JSON"):
            read_token_file(path)
