"""The shared expert: every token's, whole on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels import BlockWeight, prepare_weight, stack_weights, wide_dtype
from model.deepseek_v4.projection import Activations, Projector

if TYPE_CHECKING:
    from model.checkpoint.loader import WeightDict
    from model.parallel.collectives import Group

_BLOCK = 128  # columns of an activation block, rows of a scale block


class SharedExpert:
    """Gate, up and down product of all tokens.

    Prefill runs it whole on local rows. Where every rank of a world holds the same rows and the ranks'
    sums are added up anyway (decode), ``part`` computes whole blocks of the hidden columns instead,
    from this rank's copy of their gate and up rows and a view of ``w2``.

    Args:
        weights, prefix: e.g. ``layers.3.ffn.shared_experts``.
        limit: of SwiGLU.
        world: ranks whose parts add up; None for no parts.
    """

    def __init__(
        self,
        weights: WeightDict,
        prefix: str,
        projector: Projector,
        limit: float,
        world: Group | None,
    ) -> None:
        self.projector, self.limit = projector, limit
        gate_up = [weights.block(f"{prefix}.{name}.weight") for name in ("w1", "w3")]
        self.w1_w3 = stack_weights(gate_up)
        self.w2 = prepare_weight(weights.block(f"{prefix}.w2.weight"))
        self.share = None
        if world is not None:
            lo, hi = hidden_share(self.w2.in_features, world)
            if lo < hi:
                rows = [row_blocks(weight, lo, hi) for weight in gate_up]
                self.share = stack_weights(rows), self.w2.cols(lo, hi)

    def whole(self, x: Activations) -> Tensor:
        """Rows [T, D] -> [T, D]."""
        return self.projector.product(
            self.projector.gated(x, self.w1_w3, self.w2, self.limit), self.w2
        )

    def part(self, x: Activations) -> Tensor | None:
        """Rows [T, D] -> this rank's part of a sum over the world, wide [T, D]; None adds nothing."""
        if self.share is None:
            return None
        w1_w3, w2 = self.share
        hidden = self.projector.gated(x, w1_w3, w2, self.limit)
        return self.projector.product(hidden, w2, wide_dtype(self.projector.dtype))


def is_shared_out(projector: Projector, adds_up: bool) -> bool:
    """Whether ranks that hold the same rows compute parts of it, where their sums are added up.

    The exact numerics round its result before they add it, as the official code does.
    """
    return projector.fused and adds_up


def hidden_share(columns: int, world: Group) -> tuple[int, int]:
    """The hidden columns (start, stop) of this rank: whole blocks, shared out evenly; may be none."""
    blocks = -(-columns // _BLOCK)
    edges = [blocks * rank // world.size for rank in (world.rank, world.rank + 1)]
    return edges[0] * _BLOCK, min(edges[1] * _BLOCK, columns)


def row_blocks(weight: BlockWeight, start: int, stop: int) -> BlockWeight:
    """Rows ``start:stop`` of a whole weight, ``start`` at a scale block; views."""
    scale = weight.scale
    if scale is not None:
        blocked = scale.shape[0] != weight.data.shape[0]  # FP8; FP4 has a line of scales per row
        first, last = (start // _BLOCK, -(-stop // _BLOCK)) if blocked else (start, stop)
        scale = scale[first:last]
    return BlockWeight(weight.data[start:stop], scale, col_offset=weight.col_offset)
