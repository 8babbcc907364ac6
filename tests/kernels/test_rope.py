from __future__ import annotations

import pytest
import torch

from kernels import KernelContractError, apply_rope
from tests.kernels.oracle64 import DTYPES, assert_close, column_slice, frequencies, report, rope64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 128), (5, 3, 512), (5, 64)])
@pytest.mark.parametrize("inverse", [False, True])
def test_against_fp64(dtype: torch.dtype, shape: tuple[int, ...], inverse: bool) -> None:
    x = torch.randn(shape).to(dtype)
    positions = torch.tensor([0, 1, 127, 65_537, 1_048_575])
    inv_freq = frequencies(64)
    got = apply_rope(x, positions, inv_freq, inverse)
    assert got.dtype is dtype
    for t, position in enumerate(positions.tolist()):
        for row, out in zip(x[t].view(-1, shape[-1]), got[t].view(-1, shape[-1]), strict=True):
            assert_close(out, rope64(row, position, inv_freq, inverse), dtype)
    assert torch.equal(got[..., : shape[-1] - 64], x[..., : shape[-1] - 64])


def test_inverse_undoes() -> None:
    x, positions = torch.randn(9, 2, 128), torch.arange(9) * 997
    inv_freq = frequencies(64, 160_000.0)
    back = apply_rope(apply_rope(x, positions, inv_freq), positions, inv_freq, inverse=True)
    assert_close(back, x.double(), torch.float32)


def test_strided_rows_and_input_unchanged() -> None:
    x, positions, inv_freq = torch.randn(4, 3, 128), torch.arange(4), frequencies(64)
    view = column_slice(x)
    assert torch.equal(apply_rope(view, positions, inv_freq), apply_rope(x, positions, inv_freq))
    assert torch.equal(view, x)
    heads = torch.randn(4, 6, 128)
    assert torch.equal(
        apply_rope(heads[:, ::2], positions, inv_freq),
        apply_rope(heads[:, ::2].contiguous(), positions, inv_freq),
    )


def test_zero_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert apply_rope(torch.zeros(0, 3, 128), none, frequencies(64)).shape == (0, 3, 128)


def test_rope_before_gather_sglang_32098() -> None:
    """Shards rotated at their own absolute positions, then gathered, equal the whole."""
    x, positions, inv_freq = torch.randn(12, 128), torch.arange(12) + 1000, frequencies(64)
    shards = [apply_rope(x[a : a + 5], positions[a : a + 5], inv_freq) for a in (0, 5, 10)]
    assert torch.equal(torch.cat(shards), apply_rope(x, positions, inv_freq))
    local = apply_rope(x[5:10], torch.arange(5), inv_freq)  # the bug: positions from 0 again
    assert not torch.allclose(local, shards[1], atol=1e-2)


def test_many_rows_sglang_34822() -> None:
    rows = 70_001
    x, positions, inv_freq = torch.randn(rows, 16), torch.arange(rows), frequencies(8)
    got = apply_rope(x, positions, inv_freq)
    for t in (0, 65_535, 65_536, rows - 1):
        assert_close(got[t], rope64(x[t], t, inv_freq), torch.float32)


def test_contract() -> None:
    x, positions, inv_freq = torch.zeros(2, 128), torch.arange(2), frequencies(64)
    with pytest.raises(KernelContractError, match="positions"):
        apply_rope(x, positions[:1], inv_freq)
    with pytest.raises(KernelContractError, match="positions"):
        apply_rope(x, positions.int(), inv_freq)
    with pytest.raises(KernelContractError, match="inv_freq"):
        apply_rope(x, positions, inv_freq.half())
    with pytest.raises(KernelContractError, match="rotary dims"):
        apply_rope(x[:, :62], positions, inv_freq)
    with pytest.raises(KernelContractError, match=r"\[T, d\]"):
        apply_rope(torch.zeros(128), positions, inv_freq)
    with pytest.raises(KernelContractError, match="stride"):
        apply_rope(torch.zeros(128, 2).T, positions, inv_freq)


@pytest.mark.benchmark
def test_benchmark() -> None:
    x, positions = torch.randn(1024, 16, 512).bfloat16(), torch.arange(1024)
    report("rope 1024x16x512 bf16", lambda: apply_rope(x, positions, frequencies(64)))
