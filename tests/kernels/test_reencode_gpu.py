"""A layer with FP4 experts of which FP8 cannot hold one tensor: that one stays as it is, values and all."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import BlockWeight
from kernels.dispatch import twin
from kernels.grouped_gemm.api import PreparedExperts
from kernels.grouped_gemm.device_experts import Fp4Experts, Fp8Experts
from kernels.linear.device_weight import Fp8Weight
from tests.helpers.gpu import norm_error
from tests.kernels.op_cases.base import BF16, fp4_weight

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
EXPERTS, HIDDEN, INNER = 3, 512, 256


def layer() -> list[list[BlockWeight]]:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [[fp4_weight(CUDA, n, k) for _ in range(EXPERTS)] for n, k in shapes]


def spoil(weight: BlockWeight) -> None:
    """Sub-scales 2^30 apart in one block, of values that are not zero."""
    assert weight.scale is not None
    weight.data[:2] = 0x11
    weight.scale[0, 0], weight.scale[1, 0] = 110, 80


@pytest.mark.parametrize("keep_fp4", [False, True])
@pytest.mark.parametrize("spoiled", [None, 0, 1, 2])
def test_one_tensor_that_fp8_cannot_hold(spoiled: int | None, keep_fp4: bool) -> None:
    lists = layer()
    if spoiled is not None:
        spoil(lists[spoiled][1])
    experts = kernels.prepare_experts(*lists, keep_fp4=keep_fp4)
    stacked = Fp4Experts if keep_fp4 else Fp8Experts
    assert type(experts) is (PreparedExperts if spoiled is not None else stacked)
    for number, weights in enumerate((experts.w1, experts.w3, experts.w2)):
        for expert, weight in enumerate(weights):
            source = lists[number][expert]
            assert source.scale is not None
            assert torch.equal(weight.matrix, kernels.dequant_fp4(source.data, source.scale))
            if spoiled is not None:
                held: object = weight
                assert isinstance(held, Fp8Weight) != ((number, expert) == (spoiled, 1))
    offsets = torch.tensor([0, 20, 60, 90], device=CUDA)
    rows, weight = torch.randn(90, HIDDEN, device=CUDA).to(BF16), torch.rand(90, device=CUDA)
    how = {"limit": 10.0, "quantize": True}
    want = twin("expert_ffn")(
        rows.double(), offsets, weight.double(), twin("prepare_experts")(*lists), **how
    )
    got = kernels.expert_ffn(rows, offsets, weight, experts, limit=10.0, quantize=True)
    assert norm_error(got, want) < 2e-2  # hidden rows at the edge of two codes fall to either
    quant = kernels.expert_ffn_quant(
        kernels.quant_rows(rows), offsets, weight, experts, limit=10.0, out_dtype=BF16
    )
    assert torch.equal(quant, got)
