"""Cases of the matrix products and of everything around experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

import kernels
from kernels import BlockWeight, QuantRows
from tests.kernels.op_cases.base import (
    BF16,
    Case,
    Inputs,
    Make,
    Op,
    Rows,
    fp4_weight,
    fp8_weight,
    frequencies,
    normal,
    positions,
)

OUTPUT = "tests/kernels/test_grouped_output_gpu.py"
PROOF = "tests/kernels/test_quant_gemm_gpu.py"
CODES = ("q", "scale")
Weight = Callable[[torch.device, int, int], BlockWeight]


def bf16_weight(device: torch.device, n: int, k: int) -> BlockWeight:
    return BlockWeight((torch.randn(n, k, device=device) * 0.02).to(BF16))


def f32_weight(device: torch.device, n: int, k: int) -> BlockWeight:
    return BlockWeight(torch.randn(n, k, device=device) * 0.02)


def linear(weight: Weight, n: int, k: int, out: torch.dtype | None = None) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        prepared = kernels.prepare_weight(weight(device, n, k))

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            x = rows["x"]
            to = x.dtype if out is None or x.dtype is torch.float64 else out
            return (op(x, prepared, quantize=True, amax=None, out_dtype=to),)

        return Inputs(rows={"x": normal(device, count, k, dtype=dtype)}, call=call)

    return make


def quantised(device: torch.device, count: int, k: int, dtype: torch.dtype) -> Rows:
    """FP8 rows as plain tensors: codes and scale bytes, in rows of padded buffers."""
    made = kernels.quant_rows(normal(device, count, k, dtype=dtype))
    return {"q": made.q.view(torch.uint8), "scale": made.scale}


def as_quant_rows(rows: Rows) -> QuantRows:
    """Back again, in the layout that the type promises (rows at multiples of 16 bytes)."""
    padded = {}
    for name in CODES:
        count, width = rows[name].shape
        buffer = torch.full(
            (count, -(-width // 16) * 16), 0xFF, dtype=torch.uint8, device=rows[name].device
        )
        buffer[:, :width] = rows[name]
        padded[name] = buffer[:, :width]
    return QuantRows(q=padded["q"].view(torch.float8_e4m3fn), scale=padded["scale"])


def linear_quant(n: int, k: int, out: torch.dtype) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        prepared = kernels.prepare_weight(fp8_weight(device, n, k))

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(as_quant_rows(rows), prepared, out_dtype=out),)

        return Inputs(rows=quantised(device, count, k, dtype), call=call)

    return make


def swiglu_quant(inner: int, k: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        prepared = kernels.prepare_weight(fp8_weight(device, 2 * inner, k))

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            out = op(as_quant_rows(rows), prepared, limit=10.0, hidden_dtype=dtype)
            return out.q.view(torch.uint8), out.scale

        return Inputs(rows=quantised(device, count, k, dtype), call=call)

    return make


def experts(
    weight: Weight, hidden: int, inner: int, held: int, *, quant: bool, keep_fp4: bool = False
) -> Make:
    """``held`` experts of such weights."""

    def prepare(device: torch.device) -> kernels.PreparedExperts:
        def stack(n: int, k: int) -> list[BlockWeight]:
            return [weight(device, n, k) for _ in range(held)]

        lists = stack(inner, hidden), stack(inner, hidden), stack(hidden, inner)
        return kernels.prepare_experts(*lists, keep_fp4=keep_fp4)

    return rows_of_experts(prepare, hidden, held, quant=quant)


def rows_of_experts(
    prepare: Callable[[torch.device], kernels.PreparedExperts],
    hidden: int,
    held: int,
    *,
    quant: bool,
) -> Make:
    """Rows come in any order with an expert each; they are sorted around the op."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        prepared = prepare(device)
        rows = {
            # Uneven: the first expert has half of the rows, the last none.
            "expert": (torch.rand(count, device=device) ** 2 * (held - 1)).long(),
            "row_weight": torch.rand(count, device=device),
        }
        if quant:
            rows |= quantised(device, count, hidden, dtype)
        else:
            rows["x"] = normal(device, count, hidden, dtype=dtype)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            order = torch.sort(rows["expert"], stable=True).indices
            edges = torch.arange(held + 1, device=device)
            offsets = torch.searchsorted(rows["expert"][order], edges)
            # Room behind the last expert's rows: NaN, as are the codes and scales 0xFF.
            given = pad(rows["row_weight"][order], (0, 7), value=torch.nan)
            if quant:
                codes = {name: pad(rows[name][order], (0, 0, 0, 7), value=255) for name in CODES}
                x = as_quant_rows(codes)
                out = op(x, offsets, given, prepared, limit=10.0, out_dtype=BF16)
            else:
                x = pad(rows["x"][order], (0, 0, 0, 7), value=torch.nan)
                out = op(x, offsets, given, prepared, limit=10.0, quantize=True)
            back = out.new_empty(len(order), out.shape[1])
            back[order] = out[: len(order)]
            return (back,)

        return Inputs(rows=rows, call=call)

    return make


def grouped_output(
    heads: int, dim: int, groups: int, rank: int, rope_dim: int = 64, quant: bool = False
) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        given = fp8_weight if dim % 128 == 0 else bf16_weight
        wo_a = kernels.prepare_weight(given(device, groups * rank, heads // groups * dim))
        freq = frequencies(device, rope_dim)
        rows = {
            "o": normal(device, count, heads, dim, dtype=dtype),
            "positions": positions(device, count),
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            out = op(rows["o"], rows["positions"], freq, wo_a, groups)
            return (out.q.view(torch.uint8), out.scale) if quant else (out,)

        return Inputs(rows=rows, call=call)

    return make


def gate(hidden: int, experts_: int, kind: str) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = (torch.randn(experts_, hidden, device=device) * 0.02).to(BF16)
        bias = torch.randn(experts_, device=device) if kind == "bias" else None
        table = torch.rand(1000, experts_, device=device).argsort(dim=1)[:, :6].contiguous()
        rows = {"x": torch.randn(count, hidden, device=device).to(dtype)}
        if kind == "hash":
            rows["token_ids"] = torch.randint(0, 1000, (count,), device=device)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            ids = rows.get("token_ids")
            return tuple(
                op(
                    rows["x"],
                    weight,
                    k=6,
                    route_scale=1.5,
                    bias=bias,
                    tid2eid=None if ids is None else table,
                    token_ids=ids,
                )
            )

        return Inputs(rows=rows, call=call)

    return make


def permute(hidden: int, experts_: int, quant: bool = False) -> Make:
    """What must be the same is the row that each (token, choice) finds at its place."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        if quant:
            rows = quantised(device, count, hidden, dtype)
        else:
            rows = {"x": normal(device, count, hidden, dtype=dtype)}
        rows |= {
            "ids": torch.rand(count, experts_, device=device).argsort(dim=1)[:, :6].contiguous(),
            "weights": torch.rand(count, 6, device=device),
        }
        first, local = experts_ // 4, experts_ // 4

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            x, count = as_quant_rows(rows) if quant else rows["x"], rows["ids"].shape[0]
            out = op(x, rows["ids"], rows["weights"], first_expert=first, num_local=local)
            here = (rows["ids"] >= first) & (rows["ids"] < first + local)
            at = out.place.clamp(min=0).reshape(-1)
            made = (out.rows.q.view(torch.uint8), out.rows.scale) if quant else (out.rows,)
            found = [
                part[at].unflatten(0, (count, 6)).masked_fill(~here[..., None], 0)
                for part in (*made, out.row_weight[:, None])
            ]
            expert = torch.searchsorted(out.offsets, at, right=True) - 1 + first
            right = ((expert.view(count, 6) == rows["ids"]) & (out.place >= 0)) == here
            return (*found, right)

        return Inputs(rows=rows, call=call)

    return make


def unpermute(hidden: int, shared: bool) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        made = normal(device, 1000, hidden, dtype=dtype)
        place = torch.randint(0, 999, (count, 6), device=device)
        made[999] = torch.nan  # nobody's row
        rows = {"place": place.masked_fill(torch.rand(count, 6, device=device) < 0.3, -1)}
        if shared:
            rows["shared"] = normal(device, count, hidden, dtype=dtype)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            extra = rows.get("shared")
            source = made if extra is None else made.to(extra.dtype)
            return (op(source, rows["place"], extra, torch.float32),)

        return Inputs(rows=rows, call=call)

    return make


def cases() -> Iterator[Case]:
    """All of them."""
    # Flash and Pro: wq_b, wo_b and wq_a + wkv as the checkpoint has them.
    for name, n, k in (
        ("flash wq_a+wkv", 1536, 4096),
        ("flash wo_b", 4096, 8192),
        ("pro wq_b", 65536, 1536),
        ("pro wo_b", 7168, 16384),
        ("odd", 200, 272),
    ):
        small = name == "odd"
        make = linear(fp8_weight, n, k)
        yield Case(op="linear", name=f"fp8 {name}", make=make, bound=4e-3, big="wo_b" in name)
        if "flash" in name or small:
            make = linear(fp8_weight, n, k, torch.float32)
            yield Case(op="linear", name=f"fp8 {name} to f32", make=make, bound=5e-4, cpu=small)
            make = linear_quant(n, k, torch.float32)
            yield Case(op="linear_quant", name=name, make=make, proof=PROOF, big="wo_b" in name)
    for name, inner, k in (("flash", 2048, 4096), ("pro", 3072, 7168), ("odd", 200, 272)):
        make = swiglu_quant(inner, k)
        big, small = name == "flash", name == "odd"
        yield Case(op="linear_swiglu_quant", name=name, make=make, proof=PROOF, big=big, cpu=small)
    make = linear_quant(7168, 16384, BF16)
    yield Case(op="linear_quant", name="pro wo_b", make=make, proof=PROOF)
    make = linear(fp4_weight, 2048, 4096)
    yield Case(op="linear", name="fp4 flash w1", make=make, bound=4e-3)
    for name, n, k in (
        ("flash compressor", 1024, 4096),
        ("pro compressor", 512, 7168),
        ("flash scorer", 64, 4096),
        ("flash head", 129280, 4096),
        ("odd", 100, 75),
    ):
        make = linear(bf16_weight, n, k)
        yield Case(op="linear", name=f"bf16 {name}", make=make, bound=4e-3, cpu=name == "odd")
        if name != "flash head":
            make = linear(bf16_weight, n, k, torch.float32)
            yield Case(op="linear", name=f"bf16 {name} to f32", make=make, bound=1e-5)
    make = linear(f32_weight, 512, 1024)
    yield Case(op="linear", name="f32", make=make, bound=4e-3, cpu=True)
    for name, hidden, inner, held in (
        ("flash", 4096, 2048, 8),
        ("pro", 7168, 3072, 4),
        ("odd", 512, 160, 5),
    ):
        for keep in (False, True):
            label = f"{name} packed" if keep else name
            make = experts(fp4_weight, hidden, inner, held, quant=False, keep_fp4=keep)
            big = label == "flash"
            yield Case(
                op="expert_ffn",
                name=label,
                make=make,
                proof=PROOF,
                big=big,
                cpu=label == "odd",
            )
            make = experts(fp4_weight, hidden, inner, held, quant=True, keep_fp4=keep)
            yield Case(op="expert_ffn_quant", name=label, make=make, proof=PROOF)
    for name, heads, groups in (("flash", 64, 8), ("pro", 128, 16)):
        make = grouped_output(heads, 512, groups, 1024)
        yield Case(op="grouped_output", name=name, make=make, bound=6e-3, big=name == "flash")
        make = grouped_output(heads, 512, groups, 1024, quant=True)
        yield Case(op="grouped_output_quant", name=name, make=make, proof=OUTPUT)
    make = grouped_output(6, 72, 3, 20, 8)
    yield Case(op="grouped_output", name="odd", make=make, bound=6e-3, cpu=True)
    make = grouped_output(6, 72, 3, 20, 8, quant=True)
    yield Case(op="grouped_output_quant", name="odd", make=make, proof=OUTPUT, cpu=True)
    router = "tests/kernels/test_moe_gate_gpu.py"
    for name, hidden, count in (("flash", 4096, 256), ("pro", 7168, 384), ("odd", 200, 24)):
        small = name == "odd"
        for kind in ("bias", "hash"):
            make = gate(hidden, count, kind)
            big = kind == "bias" and name == "pro"
            label = f"{name} {kind}"
            yield Case(op="moe_gate", name=label, make=make, proof=router, big=big, cpu=small)
        make = permute(hidden, count)
        big = name == "flash"
        yield Case(op="moe_permute", name=name, make=make, proof=router, big=big, cpu=small)
        make = permute(hidden, count, quant=True)
        yield Case(op="moe_permute_quant", name=name, make=make, proof=router, big=big, cpu=small)
        for shared in (True, False):
            label = f"{name} shared" if shared else name
            make = unpermute(hidden, shared)
            bound = 1e-6 if shared else None
            yield Case(
                op="moe_unpermute",
                name=label,
                make=make,
                bound=bound,
                proof="" if shared else router,
                big=label == "pro shared",
                cpu=small,
            )
