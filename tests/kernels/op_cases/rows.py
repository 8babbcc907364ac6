"""Cases of the ops whose rows do not meet: norms, RoPE, rounding, SwiGLU, hyper-connections, noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import QuantRows
from tests.kernels.op_cases.base import (
    EPS,
    Case,
    Inputs,
    Make,
    Op,
    Rows,
    frequencies,
    norm_weight,
    normal,
    positions,
)

HIDDEN = {"flash": 4096, "pro": 7168, "odd": 1000}
HC = {"iters": 20, "eps": 1e-6, "norm_eps": EPS}


def codes(rows: QuantRows) -> tuple[Tensor, Tensor]:
    """The bytes of quantised rows."""
    return rows.q.view(torch.uint8), rows.scale


def norm(width: int, quant: bool, weight_dtype: torch.dtype = torch.float32) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = norm_weight(device, width).to(weight_dtype)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            out = op(rows["x"], weight, EPS)
            return (out[0], *codes(out[1])) if quant else (out,)

        return Inputs(rows={"x": normal(device, count, width, dtype=dtype)}, call=call)

    return make


def swiglu(width: int, quant: bool, weighted: bool) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        rows = {name: normal(device, count, width, dtype=dtype) for name in ("g", "u")}
        if weighted:
            rows["row_weight"] = torch.rand(count, device=device)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            out = op(rows["g"], rows["u"], limit=10.0, row_weight=rows.get("row_weight"))
            return codes(out) if quant else (out,)

        return Inputs(rows=rows, call=call)

    return make


def rounding(op_name: str, width: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            x = rows["x"]
            if op_name == "quant_rows":
                return codes(op(x))
            if op_name == "act_quant":
                q, scale = op(x, 128)
                return q.view(torch.uint8), scale
            if op_name == "block_amax":
                return (op(x, 128, 32),)
            if op_name == "pack_fp4":
                return tuple(op(x))
            return (op(x, 64),) if op_name == "fake_quant_fp8" else (op(x),)

        return Inputs(rows={"x": normal(device, count, width, dtype=dtype)}, call=call)

    return make


def rope(heads: int, dim: int, rope_dim: int, inverse: bool) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        freq = frequencies(device, rope_dim)
        shape = (count, heads, dim) if heads else (count, dim)
        rows = {"x": normal(device, *shape, dtype=dtype), "positions": positions(device, count)}

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["x"], rows["positions"], freq, inverse),)

        return Inputs(rows=rows, call=call)

    return make


def head_query(heads: int, dim: int, *, index: bool, rope_dim: int = 64) -> Make:
    """``q_norm_rope`` or ``index_query``."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        freq = frequencies(device, rope_dim)
        q = normal(device, count, heads, dim, dtype=dtype)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            if index:
                return (op(rows["q"], rows["positions"], freq, quantize=True),)
            return (op(rows["q"], rows["positions"], freq, EPS),)

        return Inputs(rows={"q": q, "positions": positions(device, count)}, call=call)

    return make


def kv_norm_rope(dim: int, rope_dim: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        freq, weight = frequencies(device, rope_dim), norm_weight(device, dim)
        rows = {
            "kv": normal(device, count, dim, dtype=dtype),
            "positions": positions(device, count),
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["kv"], weight, rows["positions"], freq, EPS, quantize=True),)

        return Inputs(rows=rows, call=call)

    return make


def hyper(op_name: str, width: int, streams: int = 4) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        head = op_name == "hc_head"
        mixes = streams if head else (2 + streams) * streams
        fn = torch.randn(mixes, streams * width, device=device) * 0.02
        scale = torch.rand(1 if head else 3, device=device)
        base = torch.randn(mixes, device=device)
        norm = norm_weight(device, width)
        rows = {"x": torch.randn(count, streams, width, device=device).to(dtype)}
        if "post" in op_name:
            rows["a"] = torch.randn(count, width, device=device).to(dtype)
            rows["post"] = 2 * torch.rand(count, streams, device=device)
            rows["comb"] = torch.rand(count, streams, streams, device=device) / streams

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            before = [rows[name] for name in ("a", "x", "post", "comb") if name in rows]
            if op_name == "hc_post":
                return (op(*before),)
            if head:
                return (op(*before, fn, scale, base, eps=HC["eps"], norm_eps=EPS),)
            if op_name.endswith("norm"):
                return flat(op(*before, fn, scale, base, norm, rms_eps=EPS, **HC))
            return flat(op(*before, fn, scale, base, **HC))

        return Inputs(rows=rows, call=call)

    return make


def flat(results: tuple[Tensor | QuantRows | None, ...]) -> tuple[Tensor, ...]:
    """Results with the bytes of quantised rows in the place of those."""
    out: list[Tensor] = []
    for result in results:
        if isinstance(result, QuantRows):
            out += codes(result)
        elif result is not None:
            out.append(result)
    return tuple(out)


def gumbel(vocab: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        del dtype
        rows = {
            name: torch.randint(-(1 << 62), 1 << 62, (count,), device=device)
            for name in ("seeds", "steps")
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return (op(rows["seeds"], rows["steps"], vocab, device),)

        return Inputs(rows=rows, call=call)

    return make


def cases() -> Iterator[Case]:
    """All of them."""
    bytes_proof = "tests/kernels/test_quant_rows_gpu.py"
    for name, width in HIDDEN.items():
        last = name == "pro"
        yield Case(
            op="rms_norm", name=name, make=norm(width, False), bound=4e-3, big=last, cpu=True
        )
        yield Case(
            op="rms_norm_quant", name=name, make=norm(width, True), proof=bytes_proof, big=last
        )
        yield Case(
            op="quant_rows",
            name=name,
            make=rounding("quant_rows", width),
            proof=bytes_proof,
            big=last,
        )
        for op in ("hc_pre", "hc_post", "hc_head", "hc_post_pre"):
            yield Case(op=op, name=name, make=hyper(op, width), bound=4e-3, big=last)
        for op in ("hc_pre_norm", "hc_post_pre_norm"):
            proof = "tests/kernels/test_hc_norm_gpu.py"
            yield Case(op=op, name=name, make=hyper(op, width), proof=proof, big=last)
    for op in ("hc_pre", "hc_post", "hc_head", "hc_post_pre"):
        yield Case(op=op, name="two streams", make=hyper(op, 96, 2), bound=4e-3, cpu=True)
    for name, width in (("flash", 2048), ("pro", 3072), ("odd", 1000)):
        for weighted in (True, False):
            label = f"{name} routed" if weighted else name
            big = label == "flash routed"
            yield Case(
                op="swiglu",
                name=label,
                make=swiglu(width, False, weighted),
                bound=4e-3,
                big=big,
                cpu=True,
            )
            yield Case(
                op="swiglu_quant",
                name=label,
                make=swiglu(width, True, weighted),
                proof=bytes_proof,
                big=big,
            )
    for op, width in (
        ("act_quant", 4096),
        ("block_amax", 4000),
        ("fake_quant_fp8", 448),
        ("fake_quant_fp4", 128),
        ("pack_fp4", 128),
    ):
        proof = "tests/kernels/test_quant.py"
        yield Case(op=op, name="real", make=rounding(op, width), proof=proof, cpu=op[0] != "p")
    for heads, dim, rope_dim, name in (
        (64, 512, 64, "flash"),
        (128, 512, 64, "pro"),
        (0, 512, 64, "latent"),
        (5, 72, 8, "odd"),
    ):
        yield Case(
            op="apply_rope",
            name=name,
            make=rope(heads, dim, rope_dim, inverse=name == "pro"),
            bound=4e-3,
            big=name == "flash",
            cpu=name == "odd",
        )
    for heads, name in ((64, "flash"), (128, "pro"), (5, "odd")):
        # The norm is an expression in bfloat16 (four roundings), the float64 twin rounds nothing.
        yield Case(
            op="q_norm_rope",
            name=name,
            make=head_query(heads, 512, index=False),
            bound=1.2e-2,
            big=name == "flash",
            cpu=name == "odd",
        )
    for heads, name in ((64, "real"), (5, "odd")):
        yield Case(
            op="index_query",
            name=name,
            make=head_query(heads, 128, index=True),
            proof="tests/kernels/test_rope_gpu.py",
            big=name == "real",
            cpu=name == "odd",
        )
    kv = "tests/kernels/test_kv_insert_gpu.py"
    yield Case(op="kv_norm_rope", name="real", make=kv_norm_rope(512, 64), proof=kv, big=True)
    yield Case(op="kv_norm_rope", name="odd", make=kv_norm_rope(80, 16), proof=kv, cpu=True)
    noise = "tests/kernels/test_gumbel_gpu.py"
    yield Case(op="gumbel_noise", name="real", make=gumbel(129280), proof=noise)
    yield Case(op="gumbel_noise", name="odd", make=gumbel(33001), proof=noise, big=True)
