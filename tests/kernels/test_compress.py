from __future__ import annotations

import math

import pytest
import torch

from kernels import (
    KernelContractError,
    compress,
)
from tests.kernels.oracle64 import (
    DTYPES,
    assert_close,
    column_slice,
    fq4,
    fq8,
    frequencies,
    hadamard64,
    report,
    rms64,
    rope64,
    rounded,
)

EPS = 1e-6
NEG_INF = float("-inf")


def pooled64(rows: torch.Tensor, index: list[int], ratio: int, dim: int) -> torch.Tensor:
    """One entry by the formula: per channel a softmax over the slots that exist."""
    width, out = rows.shape[1] // 2, torch.zeros(dim, dtype=torch.float64)
    for channel in range(dim):
        pairs = []
        for slot, row in enumerate(index):
            if row >= 0:
                column = channel + (slot // ratio) * dim
                pairs.append((float(rows[row, width + column]), float(rows[row, column])))
        if not pairs:
            continue
        top = max(g for g, _ in pairs)
        weights = [math.exp(g - top) if g > -math.inf else 0.0 for g, _ in pairs]
        out[channel] = sum(w * u for w, (_, u) in zip(weights, pairs, strict=True)) / sum(weights)
    return out


def group_index(group: int, ratio: int) -> list[int]:
    """Rows of entry ``group`` when row = position: the previous group first, for ratio 4."""
    own = [group * ratio + i for i in range(ratio)]
    if ratio == 128:
        return own
    return [s - 4 if group else -1 for s in own] + own


def case(ratio: int, dim: int, groups: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = dim * (2 if ratio == 4 else 1)
    rows = torch.randn(groups * ratio, 2 * width)
    rows[:, width:] *= 3
    index = torch.tensor([group_index(g, ratio) for g in range(groups)])
    return rows, index, torch.arange(groups) * ratio


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(("dim", "index_kind"), [(128, False), (128, True), (512, False)])
def test_against_fp64(dtype: torch.dtype, ratio: int, dim: int, index_kind: bool) -> None:
    rows, row_index, positions = case(ratio, dim)
    positions, inv_freq = positions + 100_000, frequencies(64, 160_000.0)
    weight = 1 + 0.1 * torch.randn(dim)

    def run(quantize: bool) -> torch.Tensor:
        return compress(
            rows,
            row_index,
            weight,
            positions,
            inv_freq,
            EPS,
            ratio=ratio,
            index=index_kind,
            quantize=quantize,
            dtype=dtype,
        )

    plain, got = run(False), run(True)
    assert got.dtype is plain.dtype is dtype
    for e in range(3):
        pooled = rounded(pooled64(rows, row_index[e].tolist(), ratio, dim), dtype)
        normed = rounded(rms64(pooled, weight, EPS), dtype)
        want = rope64(normed, int(positions[e]), inv_freq)
        assert_close(plain[e], want, dtype)
        if index_kind:
            rotated = rounded(hadamard64(plain[e]), dtype)
            step = rotated.abs().max() / 3
            assert ((got[e].double() - fq4(rotated)).abs() <= step).all()
            assert (got[e].double() == fq4(rotated)).double().mean() > 0.97
            assert torch.equal(got[e].double(), fq4(got[e]))
        else:
            assert torch.equal(got[e, : dim - 64].double(), fq8(plain[e, : dim - 64]))
            assert torch.equal(got[e, dim - 64 :], plain[e, dim - 64 :])


def run_plain(
    rows: torch.Tensor, row_index: torch.Tensor, positions: torch.Tensor, ratio: int
) -> torch.Tensor:
    width = rows.shape[1] // 2
    dim = width // 2 if ratio == 4 else width
    return compress(
        rows,
        row_index,
        torch.ones(dim),
        positions,
        frequencies(64),
        EPS,
        ratio=ratio,
        index=False,
        quantize=False,
        dtype=torch.float32,
    )


def test_overlap_halves_are_not_swapped() -> None:
    """The previous group speaks through columns [0:d), the own group through [d:2d)."""
    dim = 128
    rows = torch.zeros(8, 4 * dim)
    rows[:4, :dim], rows[:4, dim : 2 * dim] = 1.0, -7.0
    rows[4:, :dim], rows[4:, dim : 2 * dim] = -9.0, 3.0
    rows[4:, 3 * dim :] = 50.0  # gates of the own group: only it counts
    index = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    at_zero = torch.tensor([0])
    assert torch.allclose(run_plain(rows, index, at_zero, 4), torch.ones(1, dim))
    rows[:4, 2 * dim : 3 * dim] = 100.0  # now the previous group outweighs it
    rows[:4, :dim] = -1.0
    assert torch.allclose(run_plain(rows, index, at_zero, 4), -torch.ones(1, dim))


@pytest.mark.parametrize("ratio", [4, 128])
def test_missing_rows_do_not_leak(ratio: int) -> None:
    """-1 weighs nothing, though row 0 and the last row are NaN; -inf gates weigh nothing either."""
    rows, index, positions = case(ratio, 128)
    index = index[1:]
    rows[0] = rows[-1] = float("nan")
    index[index == 0] = -1
    index[index == rows.shape[0] - 1] = -1
    got = run_plain(rows, index, positions[1:], ratio)
    for e in range(index.shape[0]):
        want = rms64(pooled64(rows, index[e].tolist(), ratio, 128), torch.ones(128), EPS)
        assert_close(got[e], rope64(want, int(positions[1 + e]), frequencies(64)), torch.float32)
    gone = rows.clone().nan_to_num(0.0)
    gone[:, rows.shape[1] // 2 :] = NEG_INF
    assert torch.equal(run_plain(gone, index, positions[1:], ratio), torch.zeros_like(got))
    nothing = torch.full_like(index, -1)
    assert torch.equal(run_plain(rows, nothing, positions[1:], ratio), torch.zeros_like(got))
    assert torch.equal(run_plain(rows[:0], nothing, positions[1:], ratio), torch.zeros_like(got))


def test_large_gates() -> None:
    rows, index, positions = case(4, 128)
    rows[:, 256:] *= 1e4
    assert torch.isfinite(run_plain(rows, index, positions, 4)).all()


def test_first_token_position_decides_the_phase() -> None:
    rows, index, positions = case(4, 128)
    got = run_plain(rows, index, positions, 4)
    moved = run_plain(rows, index, positions + 1, 4)
    assert torch.equal(got[:, :64], moved[:, :64])
    assert not torch.allclose(got[:, 64:], moved[:, 64:], atol=1e-3)


@pytest.mark.parametrize("ratio", [4, 128])
def test_local_groups_equal_the_whole(ratio: int) -> None:
    """A rank that holds a segment and its halo makes the same entries, bit for bit."""
    rows, index, positions = case(ratio, 128, groups=4)
    whole = run_plain(rows, index, positions, ratio)
    halo = 4 if ratio == 4 else 0
    first = 2 * ratio - halo
    part = run_plain(rows[first:], index[2:] - first, positions[2:], ratio)
    assert torch.equal(part, whole[2:])


def test_strided_rows_and_many_entries() -> None:
    rows, index, positions = case(128, 128, groups=2)
    assert torch.equal(
        run_plain(column_slice(rows), index, positions, 128), run_plain(rows, index, positions, 128)
    )
    # More entries than one chunk holds: each like the first two.
    got = run_plain(rows, index.repeat(200, 1), positions.repeat(200), 128)
    assert torch.equal(got, run_plain(rows, index, positions, 128).repeat(200, 1))
    assert run_plain(rows, index[:0], positions[:0], 128).shape == (0, 128)


def test_contract() -> None:
    rows, index, positions = case(4, 128)
    with pytest.raises(KernelContractError, match="ratio 8"):
        run_plain(rows, index, positions, 8)
    with pytest.raises(KernelContractError, match="row_index"):
        run_plain(rows, index[:, :7], positions, 4)
    with pytest.raises(KernelContractError, match="row_index 12"):
        run_plain(rows, index + 1, positions, 4)
    with pytest.raises(KernelContractError, match="rows"):
        run_plain(rows.bfloat16(), index, positions, 4)
    with pytest.raises(KernelContractError, match="positions"):
        run_plain(rows, index, positions[:2], 4)


@pytest.mark.benchmark
def test_benchmark() -> None:
    for ratio, groups in ((4, 512), (128, 16)):
        rows, index, positions = case(ratio, 512, groups)
        report(
            f"compress ratio {ratio}, {groups} entries of 512",
            lambda r=rows, i=index, p=positions, n=ratio: run_plain(r, i, p, n),
        )
