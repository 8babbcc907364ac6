"""Router: which experts a token goes to, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import KernelContractError, check_tensor
from kernels.dispatch import kernel


def moe_gate(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    route_scale: float,
    bias: Tensor | None = None,
    tid2eid: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``k`` experts per token and weigh them.

    The score of an expert is ``sqrt(softplus(logit))`` (softplus is the identity above 20). Score
    routing takes the ``k`` largest ``score + bias``, ties to the smaller expert; hash routing reads
    the experts from ``tid2eid``. Weights are the scores without the bias, divided by their
    sum, times ``route_scale``.

    Below -20 the score is computed as ``exp(logit / 2)``, which is the same number in float32 but
    does not pass through softplus' underflow at -104; logits count as at least -160, so a score is
    never below exp(-80). So weights are finite and sum to ``route_scale`` for any finite or -inf
    logits; experts that are all below -160 share equally.

    Args:
        x: [T, D] float32 or bfloat16; used in float32, not rounded.
        weight: [E, D] float32 or bfloat16.
        k: experts per token, 1..E.
        route_scale: ``routed_scaling_factor``.
        bias: float32 [E], only for the choice; None for none. Not with hash routing.
        tid2eid: int64 or int32 [vocab, k], with ``token_ids``: hash routing.
        token_ids: int64 [T].

    Returns:
        ``(ids, w)``: int64 [T, k], ascending in each row, and float32 [T, k].

    Raises:
        KernelContractError: wrong shape, dtype or device, k outside 1..E, hash routing with a bias or
            with only one of its two tensors; on the CPU also a token id outside the table, or an
            expert id outside 0..E-1 in a row that is read. On a GPU, which nothing waits for, such a
            token's weights are NaN.
    """
    floats = (torch.float32, torch.bfloat16)
    check_tensor("moe_gate: x", x, shape=(None, None), dtype=floats)
    check_tensor("moe_gate: weight", weight, shape=(None, x.shape[1]), dtype=floats, beside=x)
    experts = weight.shape[0]
    if not 1 <= k <= experts:
        raise KernelContractError(f"moe_gate: k: expected 1..{experts}, got {k}")
    if bias is not None:
        check_tensor("moe_gate: bias", bias, shape=(experts,), dtype=torch.float32, beside=x)
    if (tid2eid is None) != (token_ids is None):
        raise KernelContractError("moe_gate: expected tid2eid and token_ids together, got only one")
    if tid2eid is not None and token_ids is not None:
        if bias is not None:
            raise KernelContractError("moe_gate: expected no bias with tid2eid, got both")
        check_tensor(
            "moe_gate: tid2eid",
            tid2eid,
            shape=(None, k),
            dtype=(torch.int64, torch.int32),
            beside=x,
        )
        check_tensor(
            "moe_gate: token_ids",
            token_ids,
            shape=(x.shape[0],),
            dtype=torch.int64,
            beside=x,
        )
    out: tuple[Tensor, Tensor] = kernel("moe_gate", x.device)(
        x,
        weight,
        k=k,
        route_scale=route_scale,
        bias=bias,
        tid2eid=tid2eid,
        token_ids=token_ids,
    )
    return out
