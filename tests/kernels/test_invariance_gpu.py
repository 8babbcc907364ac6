"""Every op on a GPU: a row has the same bits in any batch, memory, stride, size and graph.

The cases are those of ``op_cases``; ``tests/unit/test_op_cases.py`` proves that no op is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.dispatch import table, twin
from tests.kernels.attention_gpu import error
from tests.kernels.op_cases.base import BF16, Case, Inputs, Rows, own_kernels, public
from tests.kernels.op_cases.table import CASES

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BATCH = 1100
Results = tuple[Tensor, ...]
Prepared = tuple[Case, Inputs, Results]


@pytest.fixture(scope="module")
def no_backend() -> Iterator[None]:
    """What is proved here is proved of this project's kernels."""
    with own_kernels():
        yield


@pytest.fixture(scope="module", params=[case for case in CASES if case.gpu], ids=str)
def prepared(request: pytest.FixtureRequest, no_backend: None) -> Prepared:
    """Arguments of a batch and the op's results on it; made once for all tests of a case."""
    case: Case = request.param
    torch.cuda.empty_cache()
    torch.manual_seed(11)
    inputs = case.make(BATCH, CUDA, BF16)
    results = inputs.call(public(case.op), inputs.rows)
    for result in results:
        assert result.shape[0] == BATCH
        assert result.dtype is not torch.bool or bool(result.all())
    return case, inputs, results


def run(prepared: Prepared, rows: Rows) -> Results:
    case, inputs, _ = prepared
    return inputs.call(public(case.op), rows)


def same(got: Results, want: Results, pick: Tensor | slice = slice(None)) -> None:
    """Same bits (NaN equals the same NaN)."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        b = b[pick]
        assert a.dtype is b.dtype, f"result {i}"
        if bool((_bits(a) == _bits(b)).all()):
            continue
        differ = (_bits(a) != _bits(b)).reshape(a.shape[0], -1).any(dim=1)
        raise AssertionError(
            f"result {i}: {int(differ.sum())} of {a.shape[0]} rows differ, first"
            f" {int(differ.nonzero()[0])}, norm-wise {error(a, b):.2e}"
        )


def _bits(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


@pytest.mark.parametrize("count", [1, 3, 17, 128, 1000])
def test_a_row_has_the_same_bits_in_any_batch(prepared: Prepared, count: int) -> None:
    _, inputs, full = prepared
    pick = torch.randperm(BATCH, device=CUDA)[:count]
    same(run(prepared, {name: value[pick] for name, value in inputs.rows.items()}), full, pick)


def test_neighbours_of_nan_change_nothing(prepared: Prepared) -> None:
    _, inputs, full = prepared
    rows = {name: value.clone() for name, value in inputs.rows.items()}
    for value in rows.values():
        if value.is_floating_point():
            value[1::2] = torch.nan
    got = run(prepared, rows)
    same(tuple(result[::2] for result in got), full, slice(None, None, 2))


@pytest.mark.parametrize("byte", [0xFF, 0x7F])
def test_what_lies_in_fresh_memory_changes_nothing(
    prepared: Prepared, byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and workspaces come from memory full of NaN (or of huge integers and floats)."""
    monkeypatch.undo()  # torch.empty hands out memory as the allocator has it
    _, inputs, full = prepared
    for rows in (inputs.rows, {name: value[:5].clone() for name, value in inputs.rows.items()}):
        _poison(byte)
        got = run(prepared, rows)
        same(got, full, slice(0, got[0].shape[0]))


def _poison(byte: int) -> None:
    """Leave the caching allocator with blocks of one byte, of all sizes it keeps apart."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = [torch.empty(1 << 30, dtype=torch.uint8, device=CUDA) for _ in range(3)]
    held += [torch.empty(10 << 20, dtype=torch.uint8, device=CUDA) for _ in range(12)]
    held += [torch.empty(1 << 20, dtype=torch.uint8, device=CUDA) for _ in range(64)]
    for block in held:
        block.fill_(byte)
    torch.cuda.synchronize()


@pytest.mark.parametrize("gap", [16, 3])
def test_strided_rows_have_the_bits_of_dense_ones(prepared: Prepared, gap: int) -> None:
    _, inputs, full = prepared
    count = 333
    rows = {name: _spread(value[:count], gap) for name, value in inputs.rows.items()}
    same(run(prepared, rows), full, slice(0, count))


def _spread(value: Tensor, gap: int) -> Tensor:
    """The same values as a view: ``gap`` columns around every row, one more line per inner dim."""
    if value.dim() == 1:
        buffer = value.new_zeros(value.shape[0] + gap)
        view = buffer[gap:]
    else:
        sizes = [value.shape[0], *(size + 1 for size in value.shape[1:-1]), value.shape[-1] + gap]
        fill = torch.nan if value.is_floating_point() else 0
        buffer = value.new_full(sizes, fill)
        view = buffer[(slice(None), *[slice(1, None)] * (value.dim() - 2), slice(gap, None))]
    view.copy_(value)
    return view


def test_no_rows(prepared: Prepared) -> None:
    _, inputs, full = prepared
    got = run(prepared, {name: value[:0] for name, value in inputs.rows.items()})
    for result, like in zip(got, full, strict=True):
        assert (result.shape, result.dtype) == (like[:0].shape, like.dtype)


@pytest.mark.parametrize("count", [1, 17])
def test_a_captured_graph_replays_to_the_same_bits(
    prepared: Prepared, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured on some rows, replayed on others: nothing of the first ones is kept."""
    case, inputs, full = prepared
    if case.no_graph:
        pytest.skip(case.no_graph)
    monkeypatch.undo()
    static = {name: value[:count].clone() for name, value in inputs.rows.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(prepared, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(prepared, static)
    for _ in range(3):
        pick = torch.randperm(BATCH, device=CUDA)[:count]
        for name, value in inputs.rows.items():
            static[name].copy_(value[pick])
        graph.replay()
        same(got, full, pick)


def test_the_float64_twin(prepared: Prepared) -> None:
    case, inputs, full = prepared
    if case.bound is None:
        pytest.skip(f"compared in {case.proof}")
    count = 200
    rows = {name: value[:count] for name, value in inputs.rows.items()}
    wide = {name: v.double() if v.is_floating_point() else v for name, v in rows.items()}
    want = inputs.call(twin(case.op), wide)
    for got, exact in zip(full, want, strict=True):
        assert error(got[:count, ...], exact[:count]) < case.bound


def test_more_than_two_to_the_31_elements(prepared: Prepared) -> None:
    """The batch again and again, until an argument or a result has more elements than int32 counts."""
    case, inputs, full = prepared
    if not case.big:
        pytest.skip("another case of the op has this many rows")
    if table(CUDA)[case.op].name == "reference":
        pytest.skip("the torch twin runs here; its temporaries would not fit")
    values = (*inputs.rows.values(), *full)
    most = max(value[0].numel() for value in values)
    line = sum(value[0].numel() * value.element_size() for value in values)
    count = min(max((1 << 31) // most + BATCH, 70_000), 50_000_000_000 // line)
    again = torch.arange(count, device=CUDA) % BATCH
    got = run(prepared, {name: value[again] for name, value in inputs.rows.items()})
    for first in range(0, count, BATCH):
        part = slice(first, min(first + BATCH, count))
        same(tuple(g[part] for g in got), full, slice(0, part.stop - part.start))
