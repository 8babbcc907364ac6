"""The compressor's pooling on the GPU, to rows and to pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, PageLayout
from kernels.compress import reference
from kernels.page_cache import reference as pages_reference
from tests.helpers.gpu import DEVICE, Implementation, assert_near, assert_rows_alone, there
from tests.kernels.oracle64 import frequencies

pytestmark = pytest.mark.gpu
KINDS = ["triton", "cuda"]  # cuda takes the model's dims, and Triton the others
COMPRESS = {k: Implementation(f"kernels.compress.{k}_impl") for k in KINDS}
INSERT = {k: Implementation(f"kernels.compress_insert.{k}_impl") for k in KINDS}
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    (4, False, 512),
    (4, True, 128),
    (128, False, 512),
    (4, False, 128),
    (4, True, 64),
    (128, False, 128),
]


def inputs(ratio: int, dim: int, entries: int) -> tuple[Tensor, ...]:
    """Rows with NaN where no entry looks, indices with missing rows, one entry without any."""
    series = 2 if ratio == 4 else 1
    rows = torch.randn(700, 2 * series * dim)
    rows[600:] = float("nan")
    index = torch.randint(0, 600, (entries, series * ratio))
    index[:1, : 4 if ratio == 4 else 1] = -1
    if entries > 2:
        index[2] = -1
    made: tuple[Tensor, ...] = there(
        (
            rows,
            index,
            torch.randn(dim),
            torch.randint(0, 1 << 20, (entries,)),
            frequencies(64),
        )
    )
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(("ratio", "index", "dim"), CASES)
@pytest.mark.parametrize("entries", [1, 37, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_compress(
    kind: str, ratio: int, index: bool, dim: int, quantize: bool, dtype: torch.dtype, entries: int
) -> None:
    impl = COMPRESS[kind]
    rows, row_index, weight, at, freq = inputs(ratio, dim, entries)
    kwargs: dict[str, Any] = {"ratio": ratio, "index": index, "quantize": quantize, "dtype": dtype}
    want = reference.compress(rows, row_index, weight, at, freq, 1e-6, **kwargs)
    got = impl.compress(rows, row_index, weight, at, freq, 1e-6, **kwargs)
    if quantize:  # a value on the edge of two steps may fall to either side
        assert_near(got, want, bound=2e-2, unequal=0.5 if dtype is torch.float32 else 5e-3)
    else:
        assert_near(got, want, bound=3e-6 if dtype is torch.float32 else 1e-3, unequal=0.9)

    def alone(s: slice) -> Tensor:
        made: Tensor = impl.compress(rows, row_index[s], weight, at[s], freq, 1e-6, **kwargs)
        return made

    assert_rows_alone(alone, got, [r for r in (0, 1, 2, 17, 36) if r < entries])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", list(CacheDtype))
@pytest.mark.parametrize(("ratio", "index", "dim"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_compress_insert_is_the_two_ops(
    kind: str, ratio: int, index: bool, dim: int, cache: CacheDtype, dtype: torch.dtype
) -> None:
    impl, insert = COMPRESS[kind], INSERT[kind]
    rows, row_index, weight, at, freq = inputs(ratio, dim, 37)
    pages = PageLayout(
        kind=EntryKind.INDEX if index else EntryKind.LATENT,
        dtype=cache,
        head_dim=dim,
        rope_dim=0 if index else 64,
        entries_per_page=3,
    )
    slots = torch.randperm(20 * 3)[:37]
    slots[::7] = -1
    slots = there(slots)
    pool = torch.randint(0, 256, (20, pages.page_bytes), dtype=torch.uint8, device=DEVICE)
    want = pool.clone()
    kwargs = {"ratio": ratio, "quantize": True, "dtype": dtype}
    made = impl.compress(rows, row_index, weight, at, freq, 1e-6, index=index, **kwargs)
    pages_reference.store_entries(want, pages, slots, made)
    insert.compress_insert(rows, row_index, weight, at, freq, 1e-6, pool, pages, slots, **kwargs)
    assert torch.equal(pool, want)
