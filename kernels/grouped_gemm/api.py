"""Routed experts over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel
from kernels.linear.api import PreparedWeight
from kernels.weight import BlockWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedExperts:
    """Weights of this rank's experts, in local order.

    ``w1`` (gate) and ``w3`` (up) are [I, D], ``w2`` (down) is [D, I].
    """

    w1: tuple[PreparedWeight, ...]
    w3: tuple[PreparedWeight, ...]
    w2: tuple[PreparedWeight, ...]
    hidden_size: int
    intermediate_size: int
    device: torch.device

    @property
    def num_experts(self) -> int:
        """Experts held here."""
        return len(self.w1)


def prepare_experts(
    w1: Sequence[BlockWeight],
    w3: Sequence[BlockWeight],
    w2: Sequence[BlockWeight],
    *,
    keep_fp4: bool = False,
) -> PreparedExperts:
    """Bring the experts' weights into the form that ``expert_ffn`` reads.

    Args:
        w1: gate weights [I, D] in checkpoint format, one per local expert.
        w3: up weights [I, D].
        w2: down weights [D, I].
        keep_fp4: on a GPU, keep FP4 experts packed: half the memory of FP8, and half of its traffic
            where experts have few rows; with many, each call expands the experts that have rows. The
            results have the same bits. The torch twin keeps no packed form.

    Raises:
        KernelContractError: no expert, lists of different lengths, shapes that do not fit, or a list
            that mixes formats.
    """
    if not w1 or not len(w1) == len(w3) == len(w2):
        raise KernelContractError(
            "prepare_experts: expected three lists of the same length >= 1, got"
            f" {len(w1)}, {len(w3)} and {len(w2)}"
        )
    for name, weights in (("w1", w1), ("w3", w3), ("w2", w2)):
        formats = {(w.data.dtype, w.col_offset) for w in weights}
        if len(formats) > 1:
            raise KernelContractError(
                f"prepare_experts: {name}: expected one dtype and col_offset for all experts, got"
                f" {sorted(map(str, formats))}"
            )
    device = w1[0].data.device
    out: PreparedExperts = kernel("prepare_experts", device)(w1, w3, w2, keep_fp4=keep_fp4)
    for expert in range(out.num_experts):
        for name, weight, shape in (
            ("w1", out.w1[expert], (out.intermediate_size, out.hidden_size)),
            ("w3", out.w3[expert], (out.intermediate_size, out.hidden_size)),
            ("w2", out.w2[expert], (out.hidden_size, out.intermediate_size)),
        ):
            if (weight.out_features, weight.in_features) != shape:
                raise KernelContractError(
                    f"prepare_experts: {name}[{expert}]: expected shape {list(shape)}, got"
                    f" [{weight.out_features}, {weight.in_features}]"
                )
    return out


def expert_ffn(
    rows: Tensor,
    offsets: Tensor,
    row_weight: Tensor,
    experts: PreparedExperts,
    *,
    limit: float,
    quantize: bool,
) -> Tensor:
    """Clamped SwiGLU feed-forward of many experts; rows of one expert lie together.

    Per expert: ``g = w1(x)``, ``u = w3(x)``, ``a = silu(min(g, limit)) * clamp(u, -limit, limit) *
    row_weight`` cast to ``rows.dtype``, ``w2(a)``. Every product is a ``linear``: with ``quantize``
    its input is rounded (AQ).

    Args:
        rows: [N, D] float32 or bfloat16, sorted by local expert.
        offsets: int64 [E_local + 1], ascending from 0 to at most N; expert e owns the rows from
            offsets[e] to offsets[e + 1]. Rows from offsets[-1] on are room that nobody uses.
        row_weight: float32 [N], routing weights.
        experts: the weights.
        limit: SwiGLU clamp, > 0.
        quantize: the official rounding steps are on.

    Returns:
        [N, D] in ``rows.dtype``, same order; nothing that may be used from offsets[-1] on.

    Raises:
        KernelContractError: wrong shape, dtype or device, a limit that is not > 0, or offsets out of
            order (checked where the host has to read them: by the twin).
    """
    dtypes = (torch.float32, torch.bfloat16)
    device = experts.device
    check_tensor(
        "expert_ffn: rows", rows, shape=(None, experts.hidden_size), dtype=dtypes, device=device
    )
    check_tensor(
        "expert_ffn: offsets",
        offsets,
        shape=(experts.num_experts + 1,),
        dtype=torch.int64,
        beside=rows,
    )
    check_tensor(
        "expert_ffn: row_weight",
        row_weight,
        shape=(rows.shape[0],),
        dtype=torch.float32,
        beside=rows,
    )
    if not limit > 0:
        raise KernelContractError(f"expert_ffn: limit: expected a number > 0, got {limit}")
    out: Tensor = kernel("expert_ffn", device)(
        rows, offsets, row_weight, experts, limit=limit, quantize=quantize
    )
    return out
