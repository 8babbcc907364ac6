"""RoPE, the query norm and the indexer's query on the GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.index_query import reference as query_reference
from kernels.q_norm_rope import reference as norm_reference
from kernels.rope import reference as rope_reference
from tests.helpers.gpu import Implementation, assert_near, assert_rows_alone, bounds, there
from tests.helpers.strided import column_slice
from tests.kernels.oracle64 import frequencies

pytestmark = pytest.mark.gpu
KINDS = ["triton", "cuda"]  # cuda takes the model's dims, and Triton the others
QUERY = {k: Implementation(f"kernels.index_query.{k}_impl") for k in KINDS}
NORM = {k: Implementation(f"kernels.q_norm_rope.{k}_impl") for k in KINDS}
rope = Implementation("kernels.rope.triton_impl")
DTYPES = [torch.float32, torch.bfloat16]
FAR = [0, 1, 127, 65535, 262143, 1048575, 999983]


def positions(rows: int) -> torch.Tensor:
    return torch.tensor((FAR * 200)[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "rope_dim"), [((7, 64, 512), 64), ((5, 512), 64), ((3, 20, 70), 6), ((0, 4, 64), 64)]
)
def test_apply_rope(
    shape: tuple[int, ...], rope_dim: int, inverse: bool, dtype: torch.dtype
) -> None:
    x, at, freq = torch.randn(shape).to(dtype), positions(shape[0]), frequencies(rope_dim)
    want = rope_reference.apply_rope(x.double(), at, freq, inverse).to(dtype)
    got = rope.apply_rope(there(column_slice(x)), there(at), there(freq), inverse)
    assert_near(got, want, bound=2e-7 if dtype is torch.float32 else 1e-5, unequal=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 64, 512), (3, 128, 512), (600, 16, 512), (2, 5, 72)])
@pytest.mark.parametrize("kind", KINDS)
def test_q_norm_rope(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = NORM[kind]
    q, at, freq = there((torch.randn(shape).to(dtype), positions(shape[0]), frequencies(64)))
    want = norm_reference.q_norm_rope(q, at, freq, 1e-6)
    got = norm.q_norm_rope(q, at, freq, 1e-6)
    # A norm on the edge of two bf16 values may fall to either side: a whole row moves by one ulp.
    bound = {"bound": 2e-6} if dtype is torch.float32 else {"bound": 2e-3, "unequal": 0.05}
    assert_near(got, want, **bound)
    assert_rows_alone(lambda s: norm.q_norm_rope(q[s], at[s], freq, 1e-6), got, [0, shape[0] - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("shape", [(5, 64, 128), (1100, 64, 128), (3, 5, 128), (3, 4, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_index_query(kind: str, shape: tuple[int, ...], quantize: bool, dtype: torch.dtype) -> None:
    query = QUERY[kind]
    q, at, freq = there((torch.randn(shape).to(dtype), positions(shape[0]), frequencies(64)))
    want = query_reference.index_query(q, at, freq, quantize=quantize)
    got = query.index_query(q, at, freq, quantize=quantize)
    if quantize:  # a value on the edge of two FP4 steps may fall to either side
        assert_near(got, want, bound=2e-2, unequal=2e-3)
    else:
        assert_near(got, want, **bounds(dtype))
    assert_rows_alone(
        lambda s: query.index_query(q[s], at[s], freq, quantize=quantize), got, [0, shape[0] - 1]
    )
