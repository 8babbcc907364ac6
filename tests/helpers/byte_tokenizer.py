"""A ``tokenizer.json`` without merges: six control tokens, then one token per byte."""

from __future__ import annotations

import json

from cluster.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

CONTROL = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)
FIRST_BYTE = len(CONTROL)
VOCAB_SIZE = FIRST_BYTE + 256


def byte_tokenizer_json(*, think_is_special: bool = True) -> str:
    """Control tokens have ids 0..5, byte b has id 6 + b."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    char = {byte: chr(byte) for byte in printable}
    char |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    added = [
        {
            "id": index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": think_is_special or content not in (THINK, END_THINK),
        }
        for index, content in enumerate(CONTROL)
    ]
    vocab = {content: index for index, content in enumerate(CONTROL)}
    vocab |= {char[byte]: FIRST_BYTE + byte for byte in range(256)}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )
