"""The router: logits in chunks of columns, then scores, choice and weights, without a host sync.

A chunk of 512 columns is one tensor-core sum of exact bf16 products; chunks are added in float32 in
order. Few tokens: a program per chunk and 16 experts. Many: a program adds all chunks itself. The
sums are the same. Each kernel starts while the one ahead ends, and waits for it before it reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.moe_gate import reference
from kernels.triton_math import padded, twin_for_float64

_CHUNK = 512
_FEW = 128  # tokens up to which chunks are spread over programs
_TOKENS = 1  # of a program that chooses: one warp, so that no reduction crosses warps


@triton.jit(do_not_specialize=["T"])
def _logits(
    x, weight, out, stride_x, stride_w, T, E, CHUNKS,
    D: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    live = (row < T)[:, None]
    real = (expert < E)[:, None]
    k = tl.arange(0, BK)
    total = tl.zeros((BT, BE), tl.float32)
    for chunk in range(CHUNKS):
        first = (tl.program_id(2) * CHUNKS + chunk) * CHUNK
        part = tl.zeros((BT, BE), tl.float32)
        for step in range(0, CHUNK, BK):
            col = first + step + k
            inside = (col < D)[None, :]
            left = tl.load(
                x + row[:, None] * stride_x + col[None, :], mask=live & inside, other=0.0
            )
            right = weight + expert[:, None].to(tl.int64) * stride_w + col[None, :]
            right = tl.load(right, mask=real & inside, other=0.0)
            if EXACT:
                left = left.to(tl.float32)
                right = tl.trans(right.to(tl.float32))
                part = tl.dot(left, right, part, input_precision="ieee")
            else:
                part = tl.dot(left, tl.trans(right), part)
        total = total + part
    target = out + (tl.program_id(2) * T + row)[:, None] * E + expert[None, :]
    tl.store(target, total, mask=live & (expert < E)[None, :])


@triton.jit
def _score(logit):
    low = tl.minimum(logit, 20.0, propagate_nan=tl.PropagateNan.ALL)
    soft = tl.where(logit > 20.0, logit, libdevice.log1p(libdevice.exp(low)))
    small = libdevice.exp(0.5 * tl.maximum(logit, -160.0))
    return tl.where(logit < -20.0, small, tl.sqrt_rn(soft))


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["token_ids"])
def _choose(
    logits, bias, table, token_ids, ids, weights, table_stride, route_scale, T, E, VOCAB,
    PARTS: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    BIASED: tl.constexpr, HASHED: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = row < T
    expert = tl.arange(0, EP)
    inside = live[:, None] & (expert < E)[None, :]
    logit = tl.zeros((BT, EP), tl.float32)
    for part in tl.static_range(PARTS):
        source = logits + (part * T + row)[:, None] * E + expert[None, :]
        logit = logit + tl.load(source, mask=inside, other=0.0)
    score = _score(logit)
    slot = tl.arange(0, KP)
    # Empty places sort behind every expert.
    chosen = tl.zeros((BT, KP), tl.int32) + (EP + slot)[None, :]
    value = tl.zeros((BT, KP), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    lowest = tl.full((), -(2**63), tl.int64)
    wrong = row < 0
    if HASHED:
        token = tl.load(token_ids + row, mask=live, other=0)
        wrong = (token < 0) | (token >= VOCAB)
        entry = table + tl.where(wrong, 0, token) * table_stride
    else:
        biased = score
        if BIASED:
            biased = score + tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
        # One integer orders by value, then by smaller expert; NaN counts as the largest.
        bits = biased.to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        key = tl.where(inside, order * 4294967296 + (EP - 1 - expert)[None, :], lowest)
    for i in tl.static_range(K):
        if HASHED:
            one = tl.load(entry + i, mask=live, other=0).to(tl.int32)
            wrong = wrong | (one < 0) | (one >= E)
        else:
            best = tl.max(key, axis=1)
            one = EP - 1 - (best & 0xFFFFFFFF).to(tl.int32)
            key = tl.where(expert[None, :] == one[:, None], lowest, key)
        mine = tl.sum(tl.where(expert[None, :] == one[:, None], score, 0.0), axis=1)
        total = total + mine
        chosen = tl.where((slot == i)[None, :], one[:, None], chosen)
        value = tl.where((slot == i)[None, :], mine[:, None], value)
    before = chosen[:, None, :] < chosen[:, :, None]
    tied = chosen[:, None, :] == chosen[:, :, None]
    before = before | (tied & (slot[None, None, :] < slot[None, :, None]))
    rank = tl.sum(before.to(tl.int32), axis=2)
    value = tl.div_rn(value, total[:, None] + tl.zeros_like(value)) * route_scale
    # A token or expert outside its table: no host sync tells, so the row's weights do.
    chosen = tl.where(wrong[:, None], rank, chosen)
    value = tl.where(wrong[:, None], float("nan"), value)
    mask = live[:, None] & (slot < K)[None, :]
    target = row[:, None] * K + rank
    tl.store(ids + target, chosen.to(tl.int64), mask=mask)
    tl.store(weights + target, value, mask=mask)


@twin_for_float64(reference.moe_gate)
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
    """See ``kernels.moe_gate.api.moe_gate``.

    A token or expert id outside its table is not an error here, which would need a host sync: the
    row's weights are NaN.
    """
    tokens, dim = x.shape
    experts = weight.shape[0]
    ids = torch.empty((tokens, k), dtype=torch.int64, device=x.device)
    weights = torch.empty((tokens, k), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return ids, weights
    exact = not (x.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16)
    chunks = triton.cdiv(dim, _CHUNK)
    few = tokens <= _FEW
    parts = chunks if few else 1
    if exact:
        block_t, block_e, block_k, warps = 64, 16, 32, 4
    elif few:
        block_t, block_e, block_k, warps = 64, 16, 128, 4
    else:
        block_t, block_e, block_k, warps = 128, 128, 64, 8
    logits = torch.empty((parts, tokens, experts), dtype=torch.float32, device=x.device)
    _logits[(triton.cdiv(tokens, block_t), triton.cdiv(experts, block_e), parts)](
        x, weight, logits, x.stride(0), weight.stride(0), tokens, experts, chunks // parts,
        D=dim, CHUNK=_CHUNK, BT=block_t, BE=block_e, BK=block_k, EXACT=exact,
        num_warps=warps, num_stages=3, launch_pdl=True,
    )  # fmt: skip
    vocab, stride = (0, 0) if tid2eid is None else (tid2eid.shape[0], tid2eid.stride(0))
    _choose[(triton.cdiv(tokens, _TOKENS),)](
        logits, bias, tid2eid, token_ids, ids, weights, stride, route_scale, tokens, experts,
        vocab, PARTS=parts, EP=padded(experts), K=k, KP=padded(k), BT=_TOKENS,
        BIASED=bias is not None, HASHED=tid2eid is not None, num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return ids, weights
