from __future__ import annotations

import pytest
import torch

from kernels import KernelContractError, kv_norm_rope
from tests.kernels.oracle64 import (
    DTYPES,
    assert_close,
    column_slice,
    fq8,
    frequencies,
    report,
    rms64,
    rope64,
    rounded,
)

EPS = 1e-6


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(d, w) for d in DTYPES for w in DTYPES if w in (torch.float32, torch.bfloat16, d)],
)
@pytest.mark.parametrize("dim", [128, 512])
def test_against_fp64(dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> None:
    # A wide range: only values far below their block's maximum show how long a block is.
    kv = (torch.randn(3, dim) * 2.0 ** torch.randint(-14, 3, (3, dim))).to(dtype)
    weight = (1 + 0.1 * torch.randn(dim)).to(weight_dtype)
    positions, inv_freq = torch.tensor([0, 130, 700_000]), frequencies(64, 160_000.0)
    plain = kv_norm_rope(kv, weight, positions, inv_freq, EPS, quantize=False)
    got = kv_norm_rope(kv, weight, positions, inv_freq, EPS, quantize=True)
    assert got.dtype is plain.dtype is dtype
    for t, position in enumerate(positions.tolist()):
        want = rope64(rounded(rms64(kv[t], weight, EPS), dtype), position, inv_freq)
        assert_close(plain[t], want, dtype)
        # The rounding is exact: compare it bit for bit, from the op's own unrounded values.
        assert torch.equal(got[t, : dim - 64].double(), fq8(plain[t, : dim - 64]))
        assert torch.equal(got[t, dim - 64 :], plain[t, dim - 64 :])
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [False, True])
def test_kv_column_slice_sglang_25396(dtype: torch.dtype, quantize: bool) -> None:
    """kv is a column slice of the fused projection: same bits as a packed copy."""
    kv, weight = torch.randn(5, 192).to(dtype), torch.ones(192)
    positions, inv_freq = torch.arange(5), frequencies(64)
    want = kv_norm_rope(kv, weight, positions, inv_freq, EPS, quantize=quantize)
    got = kv_norm_rope(
        column_slice(kv, before=96, after=0), weight, positions, inv_freq, EPS, quantize=quantize
    )
    assert torch.equal(got, want)
    assert got.is_contiguous()


def test_rope_before_gather_sglang_32098() -> None:
    """Shards finished at their own positions, then gathered, equal the whole bit for bit."""
    kv, weight, positions = torch.randn(10, 128), torch.ones(128), torch.arange(10) + 4096
    whole = kv_norm_rope(kv, weight, positions, frequencies(64), EPS, quantize=True)
    shards = [
        kv_norm_rope(kv[a:b], weight, positions[a:b], frequencies(64), EPS, quantize=True)
        for a, b in ((0, 3), (3, 3), (3, 10))
    ]
    assert torch.equal(torch.cat(shards), whole)


def test_zero_rows_and_no_nope_dims() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    weight = torch.ones(128)
    got = kv_norm_rope(torch.zeros(0, 128), weight, none, frequencies(64), EPS, quantize=True)
    assert got.shape == (0, 128)
    all_rope = kv_norm_rope(
        torch.randn(2, 64), torch.ones(64), torch.arange(2), frequencies(64), EPS, quantize=True
    )
    assert torch.isfinite(all_rope).all()


def test_contract() -> None:
    positions, weight = torch.arange(2), torch.ones(128)
    with pytest.raises(KernelContractError, match="weight"):
        kv_norm_rope(torch.zeros(2, 192), weight, positions, frequencies(64), EPS, quantize=True)
    with pytest.raises(KernelContractError, match="multiple of 64"):
        kv_norm_rope(torch.zeros(2, 128), weight, positions, frequencies(32), EPS, quantize=True)
    kv_norm_rope(torch.zeros(2, 128), weight, positions, frequencies(32), EPS, quantize=False)


@pytest.mark.benchmark
def test_benchmark() -> None:
    kv, weight, positions = torch.randn(2048, 512).bfloat16(), torch.ones(512), torch.arange(2048)
    report(
        "kv_norm_rope 2048x512 bf16",
        lambda: kv_norm_rope(kv, weight, positions, frequencies(64), EPS, quantize=True),
    )
