"""Products of quantised rows on the CPU: the plain ops on the rows that they stand for."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    BlockWeight,
    KernelContractError,
    expert_ffn,
    expert_ffn_quant,
    linear,
    linear_quant,
    prepare_experts,
    prepare_weight,
    quant_fp8_weight,
    quant_rows,
)
from tests.helpers.strided import microseconds

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_quantised_rows(dtype: torch.dtype) -> None:
    def weight(n: int, k: int) -> BlockWeight:
        return BlockWeight(*quant_fp8_weight(torch.randn(n, k) * 0.2))

    w = prepare_weight(weight(200, 384)).cols(32, 384)
    x = torch.randn(5, 352).to(dtype)
    got = linear_quant(quant_rows(x, col_offset=32), w, out_dtype=dtype)
    assert torch.equal(got, linear(x, w, quantize=True))
    experts = prepare_experts([weight(128, 96)] * 2, [weight(128, 96)] * 2, [weight(96, 128)] * 2)
    rows, offsets, factors = torch.randn(5, 96).to(dtype), torch.tensor([0, 2, 5]), torch.rand(5)
    want = expert_ffn(rows, offsets, factors, experts, limit=7.0, quantize=True)
    again = expert_ffn_quant(
        quant_rows(rows), offsets, factors, experts, limit=7.0, out_dtype=dtype
    )
    assert torch.equal(again, want)


def test_contract_errors() -> None:
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(128, 256))))
    plain = prepare_weight(BlockWeight(torch.randn(128, 256)))
    rows = quant_rows(torch.randn(2, 256))
    with pytest.raises(KernelContractError, match="linear_quant: w: expected an FP8 or FP4"):
        linear_quant(rows, plain, out_dtype=torch.float32)
    with pytest.raises(KernelContractError, match=r"expected 128 columns at offset 0.*got 256"):
        linear_quant(rows, w.cols(0, 128), out_dtype=torch.float32)
    with pytest.raises(KernelContractError, match="out_dtype"):
        linear_quant(rows, w, out_dtype=torch.float16)
    experts = prepare_experts(*[[BlockWeight(*quant_fp8_weight(torch.randn(128, 128)))]] * 3)
    narrow, offsets = quant_rows(torch.randn(2, 128)), torch.tensor([0, 2])
    with pytest.raises(
        KernelContractError, match="rows: expected 128 columns at offset 0, got 256"
    ):
        expert_ffn_quant(rows, offsets, torch.ones(2), experts, limit=1.0, out_dtype=torch.float32)
    with pytest.raises(KernelContractError, match="expert_ffn_quant: row_weight"):
        expert_ffn_quant(
            narrow, offsets, torch.ones(3), experts, limit=1.0, out_dtype=torch.float32
        )
    with pytest.raises(KernelContractError, match="expert_ffn_quant: limit"):
        expert_ffn_quant(
            narrow, offsets, torch.ones(2), experts, limit=0.0, out_dtype=torch.float32
        )


@pytest.mark.benchmark
def test_benchmark_linear_quant() -> None:
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(512, 1024))))
    rows = quant_rows(torch.randn(64, 1024))
    us = microseconds(lambda: linear_quant(rows, w, out_dtype=torch.float32))
    print(f"linear_quant 64 x 512 x 1024: {us:.0f} us")
