"""rms_norm and swiglu on the GPU: the twin's numbers, and bits that do not depend on other rows."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import reference as norm_reference
from kernels.swiglu import reference as swiglu_reference
from tests.helpers.gpu import Implementation, assert_near, assert_rows_alone, bounds, there
from tests.helpers.strided import column_slice

pytestmark = pytest.mark.gpu
norm = Implementation("kernels.rms_norm.triton_impl")
swiglu = Implementation("kernels.swiglu.triton_impl")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "dim"), [(9, 512), (3, 1024), (5, 1536), (2, 4096), (3, 7168), (4, 24), (0, 64)]
)
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, dim) * 3).to(dtype)
    weight = torch.randn(dim)
    want = norm_reference.rms_norm(x, weight, 1e-6)
    x, weight = there((x, weight))
    got = norm.rms_norm(x, weight, 1e-6)
    assert_near(got, want, **bounds(dtype))
    assert torch.equal(norm.rms_norm(there(column_slice(x.cpu())), weight, 1e-6), got)
    assert_rows_alone(lambda at: norm.rms_norm(x[at], weight, 1e-6), got, list(range(rows)))
    heads = norm.rms_norm(x[:, None], weight, 1e-6)
    assert torch.equal(heads[:, 0], got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 2048), (3, 3072), (2, 40), (0, 64)])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu(rows: int, width: int, weighted: bool, dtype: torch.dtype) -> None:
    g, u = column_slice((torch.randn(2, rows, width) * 8).to(dtype))
    weight = torch.rand(rows) if weighted else None
    want = swiglu_reference.swiglu(g, u, limit=10.0, row_weight=weight)
    got = swiglu.swiglu(there(g), there(u), limit=10.0, row_weight=there(weight))
    assert_near(got, want, **bounds(dtype))
