"""V4-Flash with few layers, experts and words: its real layer shapes in a model that loads in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_FLASH = Path(__file__).parents[2] / "model" / "deepseek_v4" / "shapes" / "flash.json"
VOCAB = 2048


def small_flash(folder: Path, ratios: Sequence[int], *, experts: int = 16) -> str:
    """Path of a ``config.json`` with one layer for each of ``ratios``; for ``load_format: random``."""
    config = json.loads(_FLASH.read_text())
    config |= {
        "num_hidden_layers": len(ratios),
        "compress_ratios": [*ratios, 0],
        "num_hash_layers": 1,
        "n_routed_experts": experts,
        "vocab_size": VOCAB,
    }
    path = folder / f"config-{'-'.join(map(str, ratios))}.json"
    path.write_text(json.dumps(config))
    return str(path)
