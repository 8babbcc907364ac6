"""A tiny V4 checkpoint in the official format, with a byte-level tokenizer: no download needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from model.checkpoint.index import INDEX_NAME, SHARD_PATTERN
from model.checkpoint.random_source import RandomSource
from model.checkpoint.writer import write_checkpoint
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.shapes import named_shape_dict
from model.deepseek_v4.weights import WeightSlice, inventory
from model.errors import CheckpointError

# V4's control tokens, ids 0, 1, ... in this order; the 256 bytes follow.
CONTROL_TOKENS: Final = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
_BOS, _EOS = 0, 1
_NUM_TOKENS: Final = len(CONTROL_TOKENS) + 256
_MAX_BYTES: Final = 4 << 30
_SHARD_BYTES: Final = 2 << 20

# What differs from the official Flash config: every layer kind, hash and score routing, an MTP
# block. Heads, groups and experts divide over 4 ranks; a rank's rows of wo_a cut a scale block.
_TINY: Final[Mapping[str, Any]] = {
    "vocab_size": 288,
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "compress_ratios": [0, 4, 128, 4, 128, 0],
    "num_hash_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 128,
    "q_lora_rank": 128,
    "o_groups": 4,
    "o_lora_rank": 64,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}


def tiny_shape() -> dict[str, Any]:
    """The default shape of ``make_tiny`` as an official ``config.json`` object."""
    return {**named_shape_dict("flash"), **_TINY}


def make_tiny(output: Path, seed: int, shape: Mapping[str, Any] | None = None) -> list[Path]:
    """Write a random checkpoint, its config and a tokenizer; equal arguments give equal bytes.

    Args:
        output: directory, made when missing; files of an earlier run there are replaced.
        seed: of the weights.
        shape: a whole official ``config.json`` object; None for ``tiny_shape()``.

    Returns:
        The files written.

    Raises:
        CheckpointError: a shape that is not V4, too large, or too small for the tokenizer; an
            output that holds another checkpoint or cannot be written.
    """
    raw = dict(tiny_shape() if shape is None else shape)
    config = DeepSeekV4Config.from_dict(raw, where="shape")
    _check_shape(config)
    device = torch.device("cpu")
    source = RandomSource(config, seed, device)
    tensors = {
        name: source.read(WeightSlice(name=name, spec=spec))
        for name, spec in inventory(config).items()
    }
    for key in ("architectures", "model_type", "quantization_config", "torch_dtype"):
        raw.setdefault(key, named_shape_dict("flash")[key])
    documents = {
        "config.json": raw,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": _BOS,
            "eos_token_id": _EOS,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": _tokenizer_config(config),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        _clear_earlier(output)
        written = write_checkpoint(output, tensors, max_shard_bytes=_SHARD_BYTES)
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (output / name).write_text(text, encoding="utf-8")
            written.append(output / name)
    except OSError as err:
        raise CheckpointError(f"{output}: cannot be written: {err.strerror}") from err
    return written


def _check_shape(config: DeepSeekV4Config) -> None:
    if config.vocab_size < _NUM_TOKENS:
        raise CheckpointError(
            f"shape: vocab_size {config.vocab_size} is too small for the {_NUM_TOKENS} tokens of"
            f" the tokenizer ({len(CONTROL_TOKENS)} control tokens and 256 bytes)"
        )
    if (config.bos_token_id, config.eos_token_id) != (_BOS, _EOS):
        raise CheckpointError(
            f"shape: bos_token_id {config.bos_token_id} and eos_token_id {config.eos_token_id},"
            f" allowed: {_BOS} and {_EOS} (the tokenizer that is written with the weights)"
        )
    size = sum(spec.nbytes for spec in inventory(config).values())
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"shape: {size} bytes of weights, make-tiny writes at most {_MAX_BYTES};"
            " model.load_format random runs any size without a file"
        )


def _clear_earlier(output: Path) -> None:
    """Remove the shards of an earlier run; refuse a directory with a checkpoint of another origin."""
    shards = list(output.glob(SHARD_PATTERN))
    others = [path.name for path in output.glob("*.safetensors") if path not in shards]
    if others or (shards and not _is_ours(output)):
        found = ", ".join(sorted(others or [path.name for path in shards])[:3])
        raise CheckpointError(f"{output}: holds another checkpoint ({found}); name an empty folder")
    for path in shards:
        path.unlink()
    (output / INDEX_NAME).unlink(missing_ok=True)


def _is_ours(output: Path) -> bool:
    """Whether the tokenizer beside the weights is the one written here."""
    try:
        found = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == _tokenizer())


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level tokenizers: itself, or 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, spare = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return characters


def _tokenizer() -> dict[str, Any]:
    """``tokenizer.json``: byte-level BPE without merges, one token per byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(CONTROL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {
                token: index for index, token in enumerate([*CONTROL_TOKENS, *_byte_characters()])
            },
            "merges": [],
        },
    }


def _tokenizer_config(config: DeepSeekV4Config) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": CONTROL_TOKENS[_BOS],
        "eos_token": CONTROL_TOKENS[_EOS],
        "pad_token": CONTROL_TOKENS[_EOS],
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
