"""From how many rows FlashMLA decodes faster than the own kernel: ``python -m benchmarks.flash_mla``.

Gives ``FASTER_FROM`` of ``kernels/sparse_attention/flash_mla_impl.py``. One sequence of 4096 entries a row,
a ring of 128; median microseconds inside a CUDA graph, both in turns, FlashMLA's slots included.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import cast
from unittest import mock

import torch

from benchmarks import library
from benchmarks.attention_cases import SCALE, random_entries, random_ring
from benchmarks.case import graph_us, own, randn
from kernels import CacheDtype

CONTEXT = 4096
CHOSEN = {64: 512, 128: 1024}  # heads -> entries that a row attends to, as in V4-Flash and V4-Pro
ROWS = {64: (128, 256, 512, 1024), 128: (32, 64, 128, 256, 512)}


def measure(rows: int, heads: int) -> dict[str, float]:
    """Microseconds of the own kernel and of FlashMLA."""
    impl = library.module("kernels.sparse_attention.flash_mla_impl")
    q, ring = randn(rows, heads, 512), random_ring(rows, 128, CacheDtype.FP8, full=True)
    sink = torch.zeros(heads, device="cuda")
    base = random_entries(
        rows, seqs=rows, blocks=CONTEXT // 64, per_page=64, topk=CHOSEN[heads], full=True
    )
    picked = cast("torch.Tensor", base.index)
    chosen = [dataclasses.replace(base, index=(picked + 37 * i) % CONTEXT) for i in range(4)]
    kernels = {"own": own("sparse_attention"), "FlashMLA": impl.sparse_attention}
    with mock.patch.object(impl, "FASTER_FROM", dict.fromkeys(CHOSEN, 1)):
        return graph_us(
            {
                name: [partial(op, q, ring, e, sink=sink, scale=SCALE) for e in chosen]
                for name, op in kernels.items()
            }
        )


def main() -> None:
    for heads, counts in ROWS.items():
        for rows in counts:
            us = measure(rows, heads)
            found = ", ".join(f"{name} {value:.1f} us" for name, value in us.items())
            print(f"{heads} heads, {rows} rows: {found}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
