"""No op without cases: the table that the GPU tests run through, and its cases on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from kernels.dispatch import table
from tests.kernels.op_cases.base import Case, public
from tests.kernels.op_cases.table import CASES, EXEMPT

CPU = torch.device("cpu")
ON_CPU = [case for case in CASES if case.cpu]


def test_every_op_has_cases_or_a_reason_to_have_none() -> None:
    with_cases = {case.op for case in CASES if case.gpu}
    assert with_cases | set(EXEMPT) == set(table(CPU))
    assert not with_cases & set(EXEMPT)
    assert all(len(reason.split()) > 4 for reason in EXEMPT.values())


def test_cases_are_told_apart_and_compared_with_the_twin(repo_root: Path) -> None:
    assert max(Counter(map(str, CASES)).values()) == 1
    for case in CASES:
        assert (case.bound is None) == bool(case.proof), case
        assert not case.proof or (repo_root / case.proof).is_file(), case


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_a_row_of_the_twin_alone_and_in_a_batch(case: Case) -> None:
    """Sums in another order are allowed here (torch picks its kernel by size), bits are not promised."""
    inputs = case.make(9, CPU, torch.float32)
    full = inputs.call(public(case.op), inputs.rows)
    pick = torch.tensor([3, 0, 7])
    few = inputs.call(public(case.op), {name: value[pick] for name, value in inputs.rows.items()})
    for got, want in zip(few, full, strict=True):
        assert want.dtype is not torch.bool or bool(want.all())
        torch.testing.assert_close(got, want[pick], rtol=1e-5, atol=1e-5, equal_nan=True)
