"""The road that is served, with its fused ops, against the same ops one by one: not a bit differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import moe_permute, quant_rows
from model.deepseek_v4 import attention_output, moe, projection
from model.parallel.row_bytes import pack_routed, slice_rows, unpack_routed
from tests.helpers.model_setup import Setup, stream
from tests.helpers.parity_runs import shape_path
from tests.helpers.step_driver import Driver, Part, Row, rows_of

BASE = Setup(shape=shape_path(), numerics="release", load_mtp=True)


def logits() -> list[Tensor]:
    """Prefill in two chunks, then decode steps of one and of three rows, with MTP logits."""
    driver = Driver(replace(BASE, mtp=2))
    request = driver.open(stream(3, 300), slot=1)
    outs = [
        *driver.prefill(Part(request=request, count=150, mtp_logits=True)),
        *driver.prefill(Part(request=request, count=137, mtp_logits=True)),
        *driver.decode(Row(request=request, forced=1, logits=True, mtp_logits=True)),
        *driver.decode(Row(request=request, forced=3, logits=True, mtp_logits=True)),
    ]
    return [rows_of(part) for out in outs for part in (out.logits, out.mtp_logits)]


def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused ops that the layers call from now on."""
    calls: list[str] = []
    for module, name in ((attention_output, "grouped_output_quant"), (moe, "expert_ffn_quant")):
        real = getattr(module, name)

        def counted(*args: object, real: object = real, name: str = name, **kw: object) -> object:
            calls.append(name)
            return real(*args, **kw)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    return calls


def test_fused_ops_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch)
    fused = logits()
    assert {"grouped_output_quant", "expert_ffn_quant"} == set(calls)
    calls.clear()
    init = projection.Projector.__init__

    def plain(self: projection.Projector, numerics: object) -> None:
        init(self, numerics)  # type: ignore[arg-type]
        self.fused = False

    monkeypatch.setattr(projection.Projector, "__init__", plain)
    one_by_one = logits()
    assert calls == []  # the one switch reached every layer
    for a, b in zip(fused, one_by_one, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [128, 130])
@pytest.mark.parametrize("form", ["fp8", "bf16", "f32", "f64"])
def test_routed_rows_survive_the_wire(form: str, columns: int) -> None:
    dtype = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "f32": torch.float32}.get(form)
    x = torch.randn(9, columns).to(dtype or torch.float64)
    rows = quant_rows(x) if form == "fp8" else x
    ids = torch.randint(0, 200, (9, 3)).sort(1).values
    weights = torch.rand(9, 3, dtype=torch.float64 if form == "f64" else torch.float32)
    wire = pack_routed(slice_rows(rows, 2, 9), ids[2:], weights[2:])
    assert wire.dtype is torch.uint8
    assert wire.shape[1] % 16 == 0
    back, found_ids, found_weights = unpack_routed(wire, like=rows, weights_like=weights)
    assert torch.equal(found_ids, ids[2:])
    assert torch.equal(found_weights, weights[2:])
    if form == "fp8":
        assert not isinstance(back, Tensor)
        assert torch.equal(back.values(), rows.values()[2:])  # type: ignore[union-attr]
        assert back.q.stride(0) % 16 == back.scale.stride(0) % 16 == 0
    else:
        assert isinstance(back, Tensor)
        assert torch.equal(back, x[2:])
        moved = moe_permute(back, found_ids, found_weights, first_expert=0, num_local=200)
        assert torch.equal(moved.rows[moved.place[0, 0]], x[2])
