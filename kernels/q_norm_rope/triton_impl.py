"""Query norm and RoPE in one pass: the kernel of ``rope`` with its norm switched on."""

from __future__ import annotations

from torch import Tensor

from kernels.q_norm_rope import reference
from kernels.rope.triton_impl import rotate_heads
from kernels.triton_math import twin_for_float64


@twin_for_float64(reference.q_norm_rope)
def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """See ``kernels.q_norm_rope.api.q_norm_rope``."""
    return rotate_heads(q, positions, inv_freq, eps=eps, inverse=False)
