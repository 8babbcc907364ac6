"""Text to token ids and back, from a checkpoint's ``tokenizer.json`` (byte-level BPE).

Control tokens are put in by id and never made from text: user text that spells ``<｜Assistant｜>``
is encoded as ordinary characters. The prompt grammar is section 8 of the model's description.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from cluster.detokenizer import Detokenizer
from cluster.errors import RequestError
from model.errors import CheckpointError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
MAX_FILE_BYTES = 256 << 20
FILE_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: str  # system | user | assistant
    content: str


class Tokenizer:
    """One vocabulary. Thread-safe for reading."""

    def __init__(self, text: str, name: str = FILE_NAME) -> None:
        """``text``: a ``tokenizer.json``; ``name`` is used in errors (CheckpointError)."""
        spec = _parse(text, name)
        added: dict[str, int] = {
            item["content"]: item["id"] for item in spec.get("added_tokens") or []
        }
        try:
            self._full = tokenizers.Tokenizer.from_str(text)
            # Without added tokens no text can give one: for everything that users write.
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        except Exception as error:  # the package raises plain Exception only
            raise CheckpointError(f"{name}: not a usable tokenizer: {error}") from error
        self._added = added
        self._special_ids = frozenset(
            item["id"] for item in spec.get("added_tokens") or [] if item.get("special")
        )
        self._bytes = _byte_table(self._full, added)
        self.max_token_bytes = max(map(len, self._bytes.values()))

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint directory, None if it has none. Raises CheckpointError."""
        path = directory / FILE_NAME
        if not path.is_file():
            return None
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, at most {MAX_FILE_BYTES} are read")
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    def control_id(self, content: str) -> int:
        """Id of a control token by its text; RequestError if the vocabulary has none."""
        token_id = self._added.get(content)
        if token_id is None:
            raise RequestError(f"the tokenizer has no control token {content}")
        return token_id

    def encode(self, text: str, *, bos: bool = False, parse_control: bool = False) -> list[int]:
        """Ids of ``text``, after BOS if asked for. RequestError for text without a UTF-8 form.

        ``parse_control`` turns spelled control tokens into theirs: for trusted text only.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"text has a lone surrogate at character {error.start}") from error
        encoder = self._full if parse_control else self._plain
        ids = encoder.encode(text, add_special_tokens=False).ids
        return [self.control_id(BOS), *ids] if bos else list(ids)

    def encode_chat(self, messages: SequenceOf[Message], *, thinking: bool = False) -> list[int]:
        """Prompt ids of a conversation that ends with a user message, up to the answer's start.

        Consecutive user messages become one turn, joined by a blank line. Earlier answers are
        rendered without reasoning. RequestError for any other role or order.
        """
        if not messages or messages[-1].role != "user":
            raise RequestError("a conversation must end with a user message")
        ids = [self.control_id(BOS)]
        for role, text in _turns(messages):
            if role == "user":
                ids.append(self.control_id(USER))
            elif role == "assistant":
                ids += [self.control_id(ASSISTANT), self.control_id(END_THINK)]
            ids += self.encode(text)
            if role == "assistant":
                ids.append(self.control_id(EOS))
        return [*ids, self.control_id(ASSISTANT), self.control_id(THINK if thinking else END_THINK)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for an id that is not in the vocabulary."""
        return self._bytes.get(token_id, b"")

    def text_bytes(self, token_id: int) -> bytes:
        """As ``token_bytes``, but control tokens are silent."""
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def decode(self, token_ids: SequenceOf[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; what is no UTF-8 shows as U+FFFD."""
        to_bytes = self.text_bytes if skip_special_tokens else self.token_bytes
        return b"".join(map(to_bytes, token_ids)).decode("utf-8", errors="replace")

    def detokenizer(
        self, stop: tuple[str, ...] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A new incremental decoder for one request's output."""
        return Detokenizer(self.text_bytes if skip_special_tokens else self.token_bytes, stop)


def _turns(messages: SequenceOf[Message]) -> list[tuple[str, str]]:
    """(role, text) of each turn, neighbours of one role merged. RequestError for a bad order."""
    turns: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        role, text = message.role, message.content
        previous = turns[-1][0] if turns else ""
        if role not in ("system", "user", "assistant"):
            raise RequestError(
                f"messages[{index}]: role must be system, user or assistant, got {role[:40]!r}"
            )
        if role == "system" and previous not in ("", "system"):
            raise RequestError(f"messages[{index}]: a system message must come first")
        if role == "assistant" and previous != "user":
            raise RequestError(f"messages[{index}]: an answer must follow a user message")
        if role == previous:
            gap = "\n\n" if role == "user" else ""
            turns[-1] = (role, turns[-1][1] + gap + text)
        else:
            turns.append((role, text))
    return turns


def _parse(text: str, name: str) -> dict[str, Any]:
    """The file's content, if it is a byte-level tokenizer."""
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not JSON: {error}") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise CheckpointError(f"{name}: has no `model` object")
    for index, item in enumerate(spec.get("added_tokens") or []):
        fits = isinstance(item, dict) and isinstance(item.get("content"), str)
        if not fits or not isinstance(item.get("id"), int) or item["id"] < 0:
            raise CheckpointError(f"{name}: added_tokens[{index}] needs `id` and `content`")
    decoder = spec.get("decoder")
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind != "ByteLevel":
        raise CheckpointError(f"{name}: decoder must be ByteLevel, got {kind!r}")
    return spec


def _byte_table(tokenizer: tokenizers.Tokenizer, added: dict[str, int]) -> dict[int, bytes]:
    """Bytes of every id. Byte-level vocabularies spell each byte as one printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    spelled.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    table = {}
    for content, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        try:
            table[token_id] = bytes(spelled[char] for char in content)
        except KeyError:
            table[token_id] = content.encode("utf-8")
    table.update({token_id: content.encode("utf-8") for content, token_id in added.items()})
    return table
