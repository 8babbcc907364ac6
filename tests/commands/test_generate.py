"""``generate`` and ``eval retrieval`` with the trained tiny model, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets" / "tiny-python"
CONFIG = ROOT / "configs" / "tiny_cpu_cp2.yaml"
GOLDEN = json.loads((TINY / "golden.json").read_text(encoding="utf-8"))["prompts"]
COMMON = [
    *("--config", str(CONFIG), "--set", f"model.path={TINY}"),
    *("--set", "cluster.executor=local"),
]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2])
def test_golden_greedy_text(
    drafts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All golden prompts at once, in fp32 on cp 2: the ids, reasons and counts of every line."""
    source = tmp_path / "ids.json"
    source.write_text(json.dumps({"requests": [p["prompt_ids"] for p in GOLDEN]}))
    longest = max(len(p["greedy_ids"]) for p in GOLDEN)
    argv = [
        *("generate", "--token-ids", str(source), "--json", "--max-tokens", str(longest), *COMMON),
        *("--set", "model.numerics=fp32", "--set", f"speculative.mtp={drafts}"),
    ]
    assert main(argv) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(GOLDEN)))
    for line, prompt in zip(lines, GOLDEN, strict=True):
        assert line["token_ids"] == prompt["greedy_ids"]
        ended = prompt["greedy_ids"][-1] == 1
        assert line["finish_reason"] == ("stop" if ended else "length")
        assert line["text"] == prompt["text"].removesuffix("<｜end▁of▁sentence｜>")
        assert line["prompt_tokens"] == len(prompt["prompt_ids"])
        assert line["cached_tokens"] == 0
        timings = line["timings"]
        assert 0 <= timings["queue_s"] <= timings["ttft_s"] <= timings["e2e_s"]
        assert timings["tokens_per_s"] > 0
    assert "rank 1" in captured.err
    assert ("MTP acceptance" in captured.err) == (drafts > 0)


def test_chat_streams_text_and_news_apart(capsys: pytest.CaptureFixture[str]) -> None:
    chat = next(p for p in GOLDEN if p["chat"])
    argv = [
        *("generate", "--chat", "--prompt", chat["prompt"], "--max-tokens", "12", *COMMON),
        *("--set", "model.numerics=fp32", "--set", "parallel.cp=1"),
    ]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert chat["text"].startswith(captured.out.removesuffix("\n"))
    assert len(captured.out) > 10
    assert "12 tokens in" in captured.err


def test_without_a_tokenizer_text_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "ids.json"
    source.write_text("[5, 6, 7]")
    argv = [
        *("generate", "--token-ids", str(source), "--json", "--max-tokens", "3"),
        *("--set", "model.load_format=random", "--set", f"model.shape={TINY / 'config.json'}"),
        *("--set", "cluster.executor=local", "--set", "device=cpu"),
        *("--set", "kv_cache.num_blocks=8", "--ignore-eos"),
    ]
    assert main(argv) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["text"] is None
    assert len(line["token_ids"]) == 3
    assert line["finish_reason"] == "length"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cp", "tp", "lengths", "settings"),
    [
        (2, 1, (639, 2048), ["parallel.kv_shard=cp", "speculative.mtp=1"]),
        (
            2,
            2,
            (641,),
            ["--repeat=2", "parallel.cp_gather=kv_bf16", "scheduler.max_batched_tokens=300"],
        ),
        (4, 1, (642,), ["scheduler.max_batched_tokens=777"]),
    ],
    ids=["cp2-shard-mtp", "cp2tp2-chunked", "cp4-chunked"],
)
def test_retrieval_is_perfect(
    cp: int,
    tp: int,
    lengths: tuple[int, ...],
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As served (release numerics, fp8 caches): every residue mod 4, and around 128k."""
    argv = [
        *("eval", "retrieval", *COMMON, "--output", str(tmp_path / "out"), "--num", "1"),
        *("--lengths", ",".join(map(str, lengths)), "--distances", "20,130,600,1900"),
        *("--set", f"parallel.cp={cp}", "--set", f"parallel.tp={tp}"),
    ]
    for setting in settings:
        argv += [setting] if setting.startswith("--") else ["--set", setting]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "100%" in captured.out
    rounds = 2 if "--repeat=2" in settings else 1
    assert ("came from the prefix cache" in captured.err) == (rounds == 2)
    record = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    scores = record["scores"]
    assert {s["length"] for s in scores} == set(lengths)
    assert [s for s in scores if s["correct"] != s["total"]] == []
    assert sum(s["total"] for s in scores) == rounds * sum(4 if n > 1900 else 3 for n in lengths)
    assert (tmp_path / "out" / "retrieval.png").stat().st_size > 1000


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("chunk", [1024, 517])
def test_retrieval_on_every_mesh(cp: int, tp: int, chunk: int, tmp_path: Path) -> None:
    """All distances at every residue mod 4 and around 128k, cold and after prefix hits, with MTP."""
    argv = [
        *("eval", "retrieval", *COMMON, "--output", str(tmp_path / "out")),
        *("--lengths", "1919,1920,1921,2046", "--num", "1", "--repeat", "2"),
        *("--set", f"parallel.cp={cp}", "--set", f"parallel.tp={tp}"),
        *("--set", f"scheduler.max_batched_tokens={chunk}", "--set", "speculative.mtp=1"),
        *("--set", "kv_cache.num_blocks=1024"),
    ]
    assert main(argv) == 0
    scores = json.loads((tmp_path / "out" / "retrieval.json").read_text())["scores"]
    assert [s for s in scores if s["correct"] != s["total"]] == []
    assert sum(s["total"] for s in scores) == 2 * 28
