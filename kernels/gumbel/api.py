"""Gumbel noise that depends on nothing but a seed, a step and the column."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def gumbel_noise(seeds: Tensor, steps: Tensor, vocab: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise: row i is a pure function of ``seeds[i]``, ``steps[i]`` and the column.

    A 64-bit integer hash gives the same 52 random bits on any device; ``-log(-log(u))`` is taken in
    float64 and cast. Values are finite, in -3.7 .. 36.8.

    Args:
        seeds: int64 [N], any value.
        steps: int64 [N], any value (the sampler passes output positions).
        vocab: columns, >= 1.
        device: where the noise is made; ``seeds`` and ``steps`` are moved there.

    Returns:
        float32 [N, vocab].

    Raises:
        KernelContractError: wrong shape or dtype, or ``vocab`` < 1.
    """
    check_tensor("gumbel_noise: seeds", seeds, shape=(None,), dtype=torch.int64)
    check_tensor("gumbel_noise: steps", steps, shape=(seeds.shape[0],), dtype=torch.int64)
    if vocab < 1:
        raise KernelContractError(f"gumbel_noise: vocab: expected >= 1, got {vocab}")
    out: Tensor = kernel("gumbel_noise", device)(seeds, steps, vocab, device)
    return out
