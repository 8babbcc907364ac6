"""Bytes that a plan's weights take on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable

from model.deepseek_v4.weights import FP4_BLOCK, FP8_BLOCK, WeightSlice, slice_bytes

_SHARED_GATE_UP = re.compile(r"\.shared_experts\.w[13]\.")


def held_bytes(plan: Iterable[WeightSlice], *, keep_fp4: bool, shares: int = 1) -> int:
    """Bytes of a plan's weights on a GPU, in the form that its kernels read.

    FP4 becomes FP8 unless the routed experts stay packed (``model.keep_fp4``), ``wo_a`` becomes bf16.
    Weights that FP8 cannot hold without loss take more; no official checkpoint has one.

    Args:
        shares: ranks that split the shared expert in decode; each holds its gate and up rows twice.
    """
    items = {item.name: item for item in plan}
    total = 0
    for name, item in items.items():
        weight = items.get(name.removesuffix(".scale") + ".weight", item)
        kept = keep_fp4 and ".experts." in name
        size, own = slice_bytes(item), weight is item
        if shares > 1 and _SHARED_GATE_UP.search(name):
            # Shared out in whole blocks of rows; the rank with most of them counts.
            blocks = -(-weight.spec.shape[0] // FP8_BLOCK)
            total += size * -(-blocks // shares) // blocks
        if weight.spec.dtype == "I8":
            fp8 = 2 * size if own else size * FP4_BLOCK // FP8_BLOCK**2
            total += (size if kept else 0) + (fp8 if not (kept and own) else 0)
        elif weight.name.endswith(".wo_a.weight") and weight.spec.dtype == "F8_E4M3":
            total += 2 * size if own else 0
        else:
            total += size
    return total
