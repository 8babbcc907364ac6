"""Products of quantised rows on the CPU: the plain ops on the rows that they stand for."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    BlockWeight,
    KernelContractError,
    QuantRows,
    expert_ffn,
    expert_ffn_quant,
    linear,
    linear_quant,
    linear_swiglu_quant,
    prepare_experts,
    prepare_weight,
    quant_fp8_weight,
    quant_rows,
    swiglu_quant,
)
from kernels.quant_gemm import pieces
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_in_one_weight(dtype: torch.dtype) -> None:
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(320, 256) * 0.3)))
    rows = quant_rows(torch.randn(6, 256))
    got = linear_swiglu_quant(rows, w, limit=2.0, hidden_dtype=dtype)
    gate, up = (
        linear_quant(rows, half, out_dtype=dtype) for half in (w.rows(0, 160), w.rows(160, 320))
    )
    want = swiglu_quant(gate, up, limit=2.0)
    assert got.shape == (6, 160)
    assert torch.equal(got.values(), want.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_behind_the_last_expert_belong_to_nobody(dtype: torch.dtype) -> None:
    def weights(n: int, k: int) -> list[BlockWeight]:
        return [BlockWeight(*quant_fp8_weight(torch.randn(n, k) * 0.2)) for _ in range(2)]

    experts = prepare_experts(weights(128, 96), weights(128, 96), weights(96, 128))
    rows, offsets, factors = quant_rows(torch.randn(9, 96)), torch.tensor([0, 2, 5]), torch.rand(9)
    rows.q.view(torch.uint8)[5:] = 0x7F
    rows.scale[5:] = 0xFF
    mine = QuantRows(q=rows.q[:5], scale=rows.scale[:5])
    want = expert_ffn_quant(mine, offsets, factors[:5], experts, limit=7.0, out_dtype=dtype)
    factors[5:] = float("nan")
    got = expert_ffn_quant(rows, offsets, factors, experts, limit=7.0, out_dtype=dtype)
    assert torch.equal(got[:5], want)


def test_contract_errors() -> None:
    w = prepare_weight(BlockWeight(*quant_fp8_weight(torch.randn(128, 256))))
    plain = prepare_weight(BlockWeight(torch.randn(128, 256)))
    rows = quant_rows(torch.randn(2, 256))
    with pytest.raises(KernelContractError, match="linear_quant: w: expected an FP8 or FP4"):
        linear_quant(rows, plain, out_dtype=torch.float32)
    with pytest.raises(KernelContractError, match=r"expected 128 columns at offset 0.*got 256"):
        linear_quant(rows, w.cols(0, 128), out_dtype=torch.float32)
    with pytest.raises(KernelContractError, match=r"linear_swiglu_quant: w: .*even.*got 127"):
        linear_swiglu_quant(rows, w.rows(0, 127), limit=1.0, hidden_dtype=torch.float32)
    with pytest.raises(KernelContractError, match="linear_swiglu_quant: limit"):
        linear_swiglu_quant(rows, w, limit=0.0, hidden_dtype=torch.float32)
    with pytest.raises(KernelContractError, match="linear_swiglu_quant: hidden_dtype"):
        linear_swiglu_quant(rows, w, limit=1.0, hidden_dtype=torch.float16)
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


def test_pieces_leave_little_to_the_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pieces.piece_height(4096, 4096, cpu) is None  # no backend
    monkeypatch.setattr(pieces, "_is_served", lambda device: True)
    heights = {
        count: pieces.piece_height(count, 4096, cpu)
        for count in (0, 1, 1000, 1024, 1500, 2048, 3072, 4096, 4097, 6144, 8191, 8192, 9000)
    }
    assert {count: h for count, h in heights.items() if h} == {
        **{1024: 1024, 2048: 2048, 3072: 1024, 4096: 4096, 6144: 2048, 8192: 4096, 9000: 4096}
    }
    assert pieces.piece_height(1024, 3072, cpu) is None  # not listed at this height
    assert pieces.piece_height(4096, 512, cpu) is None  # nobody's columns


def test_scales_of_a_whole_listed_weight_become_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_is_served", lambda device: True)
    n, k = 4096, 2048
    data = torch.zeros(n, k, dtype=torch.float8_e4m3fn)
    scale = torch.randint(0, 256, (n // 128, k // 128), dtype=torch.uint8)
    scale[0, :2] = torch.tensor([0, 255])
    got = pieces.weight_scale(data, scale)
    assert got is not None
    want = torch.exp2(scale.double() - 127).masked_fill(scale == 255, torch.nan)
    assert torch.equal(got.double().nan_to_num(-1), want.nan_to_num(-1))
    assert pieces.weight_scale(data[:, :-128], scale[:, :-1]) is None  # another shape
    assert pieces.weight_scale(data.view(torch.uint8).t(), scale.t()) is None  # not in order
    assert pieces.weight_scale(data, torch.cat((scale, scale[:1]))) is None  # starts inside a block
