"""Every breach of the file format is one clear error, found before a tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.checkpoint.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from model.checkpoint.writer import write_safetensors
from model.errors import CheckpointError


def _entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "U8") -> Any:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape,
            "data_offsets": [start, stop]}  # fmt: skip


def test_good_file(raw_file: Callable[..., Path]) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": _entry(4, 8, [2, 2]),
        "empty": _entry(4, 4, [0, 3]),
        "a": _entry(0, 4, [], "F32"),
    }
    file = SafetensorsFile(raw_file(header, bytes(range(8))))
    assert file.read("b", None, None).tolist() == [4, 5, 6, 7]
    assert file.read("b", (1, 2), None).tolist() == [6, 7]
    assert file.read("b", None, (1, 2)).tolist() == [5, 7]
    assert file.read("a", None, None).tolist() == [0, 1, 2, 3]
    assert file.read("empty", None, None).tolist() == []
    file.close()
    assert file.read("b", (0, 0), None).tolist() == []  # maps again


BAD: list[tuple[str, Any, bytes, str]] = [
    ("past_end", {"x": _entry(0, 8)}, b"1234", "ends at byte"),
    ("overlap", {"x": _entry(0, 4), "y": _entry(2, 6)}, b"123456", "'y' overlaps tensor 'x'"),
    ("same_bytes", {"x": _entry(0, 4), "y": _entry(0, 4)}, b"1234", "overlaps"),
    ("hole", {"x": _entry(0, 2), "y": _entry(3, 4)}, b"1234", "1 unused bytes before tensor 'y'"),
    ("left_over", {"x": _entry(0, 2)}, b"1234", "2 bytes after the last tensor"),
    ("dtype", {"x": _entry(0, 4, dtype="F4_WHAT")}, b"1234", "'x': unknown dtype 'F4_WHAT'"),
    ("dtype_type", {"x": _entry(0, 4, dtype=[3])}, b"1234", "'x': unknown dtype list"),  # type: ignore[arg-type]
    ("size", {"x": _entry(0, 4, [5])}, b"1234", "'x': U8 [5] takes 5 bytes, data_offsets span 4"),
    ("negative", {"x": _entry(0, 4, [-4])}, b"1234", "'x': shape must be"),
    ("two_negatives", {"x": _entry(0, 4, [-2, -2])}, b"1234", "'x': shape must be"),
    ("huge_dim", {"x": _entry(0, 4, [2**63, 4])}, b"1234", "'x': shape must be"),
    ("overflow", {"x": _entry(0, 0, [2**40, 2**40, 0])}, b"", None),
    ("product", {"x": _entry(0, 4, [2**33, 2**31])}, b"1234", "takes 18446744073709551616 bytes"),
    ("bool_dim", {"x": _entry(0, 1, [True])}, b"1", "'x': shape must be"),
    ("float_dim", {"x": _entry(0, 1, [1.0])}, b"1", "'x': shape must be"),
    ("rank", {"x": _entry(0, 1, [1] * 9)}, b"1", "'x': shape must be"),
    ("reversed", {"x": {**_entry(0, 0), "data_offsets": [4, 0]}}, b"1234", "'x': data_offsets"),
    ("offsets", {"x": {**_entry(0, 4), "data_offsets": [0]}}, b"1234", "'x': data_offsets"),
    ("no_dtype", {"x": {"shape": [], "data_offsets": [0, 0]}}, b"", "'x': must hold dtype"),
    ("not_object", {"x": 3}, b"", "'x': must hold dtype"),
    ("metadata", {"__metadata__": 3}, b"", "__metadata__ must be an object"),
    ("list", b"[]", b"", "expected a JSON object, got list"),
    ("not_json", b"{nope", b"", "not valid JSON"),
    ("not_utf8", b'{"\xff":1}', b"", "not valid JSON"),
    ("long_number", b'{"x": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    ("deep", b'{"x":' + b"[" * 200_000, b"", "nested too deeply"),
    ("duplicate", b'{"x":{"a":1},"x":{"a":1}}', b"", "'x' appears twice"),
    ("empty", b"", b"", "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "data", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_headers(
    raw_file: Callable[..., Path], header: Any, data: bytes, message: str | None
) -> None:
    path = raw_file(header, data)
    if message is None:
        assert SafetensorsFile(path).entries["x"].shape == (2**40, 2**40, 0)
        return
    with pytest.raises(CheckpointError) as info:
        SafetensorsFile(path)
    text = str(info.value)
    assert text.startswith("model.safetensors: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (MAX_HEADER_BYTES + 1, "header of 100000001 bytes, allowed: 100000000"),
        (2**63, "header of 9223372036854775808 bytes"),
        (1000, "does not fit a file of"),
    ],
)
def test_header_length(raw_file: Callable[..., Path], length: int, message: str) -> None:
    with pytest.raises(CheckpointError) as info:
        SafetensorsFile(raw_file({}, length=length))
    assert message in str(info.value)


def test_no_file_and_short_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read"):
        SafetensorsFile(tmp_path / "gone.safetensors")
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="short: 3 bytes are too few"):
        SafetensorsFile(tmp_path / "short")


def test_too_many_entries(raw_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.safetensors_file.MAX_ENTRIES", 9)
    with pytest.raises(CheckpointError, match="10 tensors, allowed: 9"):
        SafetensorsFile(raw_file({str(i): _entry(0, 0) for i in range(10)}))


def test_names_are_escaped_and_short(raw_file: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError) as info:
        SafetensorsFile(raw_file({"\n\x1b[31m" + "x" * 5000: 3}))
    assert "\\n\\x1b[31mxxx" in str(info.value)
    assert len(str(info.value)) < 300


def test_file_that_shrinks_after_the_check(raw_file: Callable[..., Path]) -> None:
    path = raw_file({"x": _entry(0, 100)}, bytes(100))
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="became shorter"):
        file.read("x", None, None)


@given(st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutated_files_open_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Flipped, cut or inserted bytes: either the file opens and every read fits, or one error."""
    header = {"x": _entry(0, 6, [3], "BF16"), "y": _entry(6, 10, [2, 2], "I8")}
    text = json.dumps(header).encode()
    raw = bytearray(struct.pack("<Q", len(text)) + text + bytes(range(10)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 4))]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        if not raw:
            return
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(raw)
    refusal = ""
    try:
        file = SafetensorsFile(path)
    except CheckpointError as err:
        refusal = str(err)
    if refusal:
        assert refusal.startswith("mutated.safetensors: ")
        return
    for name, entry in file.entries.items():
        assert file.read(name, None, None).size == entry.stop - entry.start


def test_the_safetensors_package_agrees(tmp_path: Path) -> None:
    tensors = {
        "f": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "i": torch.arange(6).reshape(2, 3),
        "q": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in theirs.items()} == {
        k: (v.dtype, v.shape) for k, v in tensors.items()
    }
    assert all(torch.equal(theirs[k].float(), v.float()) for k, v in tensors.items())
    save_file(tensors, tmp_path / "theirs.safetensors")
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    for name, tensor in tensors.items():
        assert file.read(name, None, None).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
