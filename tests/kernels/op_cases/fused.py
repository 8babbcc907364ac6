"""Cases of the ops that join neighbours, and of what ranks exchange."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import CacheDtype, EntryKind, PageLayout
from kernels.compress.api import SERIES
from kernels.compress_decode.api import CompressPart
from kernels.row_exchange import reference as exchange
from kernels.row_exchange.api import RowCopy, RowStream, stream_offsets
from kernels.sample_partial.api import PartialSample
from tests.kernels.op_cases.base import (
    EPS,
    Case,
    Inputs,
    Make,
    Op,
    Rows,
    empty_pool,
    frequencies,
    layout,
    norm_weight,
    normal,
    pages_for,
    positions,
    stored_bytes,
)
from tests.kernels.op_cases.pages import slots_of

LATENT, INDEX, FP8 = EntryKind.LATENT, EntryKind.INDEX, CacheDtype.FP8


def qkv(heads: int, dim: int, rope: int, index_heads: int, dtype: CacheDtype) -> Make:
    def make(count: int, device: torch.device, stream: torch.dtype) -> Inputs:
        shape = layout(LATENT, dtype, 132, dim, rope)
        count_pages, far = pages_for(device, count, 132)
        freq, weight = frequencies(device, rope), norm_weight(device, dim)
        rows = {
            "q": normal(device, count, heads, dim, dtype=stream),
            "kv": normal(device, count, dim, dtype=stream),
            "positions": positions(device, count),
            "slots": slots_of(count, device, count_pages * 132),
        }
        if index_heads:
            rows["index_q"] = normal(device, count, index_heads, 128, dtype=stream)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            pool = empty_pool(device, shape, count_pages, far)
            out = op(
                rows["q"],
                rows["kv"],
                weight,
                rows["positions"],
                freq,
                EPS,
                pool,
                shape,
                rows["slots"],
                quantize=True,
                index_q=rows.get("index_q"),
            )
            made = (part for part in out if part is not None)
            return (*made, *stored_bytes(pool, shape, rows["slots"]))

        return Inputs(rows=rows, call=call)

    return make


def line(value: Tensor) -> Tensor:
    """One row after the other, without gaps."""
    return value.reshape(-1).contiguous()


def compress_decode(ratio: int, layouts: tuple[PageLayout, ...], rope: int, steps: int) -> Make:
    """A line is a sequence with ``steps`` rows; its ring holds NaN where the step need not look."""
    pooled = SERIES[ratio] * ratio

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        ring = pooled + steps + 1
        widths = [2 * SERIES[ratio] * shape.head_dim for shape in layouts]
        freq = frequencies(device, rope)
        first = torch.randint(0, 1 << 18, (count,), device=device)
        ends = first - first % ratio + ratio - 1 - torch.randint(0, steps, (count,), device=device)
        first = torch.where(torch.rand(count, device=device) < 0.7, ends.clamp(min=0), first)
        first[::9] %= pooled  # the start of a sequence: rows before it are missing
        at = first[:, None] + torch.arange(steps, device=device)
        base = torch.arange(count, device=device) * ring
        state = torch.full((count * ring, sum(widths)), torch.nan, device=device)
        before = first[:, None] - 1 - torch.arange(pooled - 1, device=device)
        known = (base[:, None] + before % ring)[before >= 0]
        state[known] = torch.randn(len(known), sum(widths), device=device)
        ape = [torch.randn(ratio, width // 2, device=device) for width in widths]
        weight = [norm_weight(device, shape.head_dim) for shape in layouts]
        count_pages, far = pages_for(device, count * steps, 64)
        rows = {
            "rows": torch.randn(count, steps, sum(widths), device=device),
            "positions": at,
            "seq": torch.arange(count, device=device)[:, None].expand(count, steps).clone(),
            "base": base[:, None].expand(count, steps).clone(),
        }
        for i in range(len(layouts)):
            slots = slots_of(count * steps, device, count_pages * 64)
            rows[f"slots{i}"] = slots.view(count, steps)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            lines = rows["rows"].shape[0]
            kept = state.clone()
            pools = [empty_pool(device, shape, count_pages, far) for shape in layouts]
            parts = tuple(
                CompressPart(
                    ape=ape[i],
                    norm_weight=weight[i],
                    pool=pools[i],
                    layout=layouts[i],
                    slots=line(rows[f"slots{i}"]),
                )
                for i in range(len(layouts))
            )
            op(
                rows["rows"].reshape(lines * steps, sum(widths)),
                kept,
                parts,
                line(rows["positions"]),
                line(rows["seq"]),
                line(rows["base"]),
                ratio=ratio,
                ring_rows=ring,
                inv_freq=freq,
                eps=EPS,
                quantize=True,
                dtype=dtype,
            )
            done = (rows["positions"] + 1) % ratio == 0
            where = rows["base"] + rows["positions"] % ring
            results = [kept[where]]
            for i, (pool, shape) in enumerate(zip(pools, layouts, strict=True)):
                slots = rows[f"slots{i}"].masked_fill(~done, -1).reshape(-1)
                found, clean = stored_bytes(pool, shape, slots)
                results += [found.unflatten(0, (lines, steps)), clean.view(lines, steps)]
            kept[where.reshape(-1)] = state[where.reshape(-1)]
            untouched = (kept.view(torch.int32) == state.view(torch.int32)).all()
            return (*results, untouched.expand(lines).clone())

        return Inputs(rows=rows, call=call)

    return make


def sample_partial(vocab: int, offset: int, size: int, with_peak: bool) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        del dtype
        logits = 8 * torch.randn(count, vocab, device=device)
        rows = {
            "logits": logits,
            "temperature": torch.rand(count, device=device).sub(0.3).clamp(min=0.0),
            "seeds": torch.randint(-(1 << 62), 1 << 62, (count,), device=device),
            "steps": torch.randint(0, 1 << 20, (count,), device=device),
        }
        if with_peak:
            rows["peak"] = logits.amax(dim=1) + torch.rand(count, device=device)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            out: PartialSample = op(
                rows["logits"],
                rows["temperature"],
                rows["seeds"],
                rows["steps"],
                vocab_offset=offset,
                vocab_size=size,
                peak=rows.get("peak"),
            )
            return out.score, out.ids, out.lse

        return Inputs(rows=rows, call=call)

    return make


def merge_samples(ranks: int) -> Make:
    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        del dtype
        rows = {
            "score": torch.randn(count, ranks, device=device).round(decimals=1),
            "ids": torch.randint(0, 1 << 17, (count, ranks), device=device),
            "lse": torch.randn(count, ranks, device=device),
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            return tuple(op(*(rows[name].T.contiguous() for name in ("score", "ids", "lse"))))

        return Inputs(rows=rows, call=call)

    return make


def exchanged(op_name: str, widths: tuple[int, ...]) -> Make:
    """Rows that two ranks publish, several streams at once; all results are copies of rows."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        rows = {}
        for i, width in enumerate(widths):
            for name in ("mine", "theirs", "old"):
                rows[f"{name}{i}"] = torch.randn(count, width, device=device).to(dtype)

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            count = rows["mine0"].shape[0]
            streams, theirs = (
                tuple(
                    RowStream(local=rows[f"{name}{i}"], counts=(count, count), carried=old)
                    for i, old in ((i, rows[f"old{i}"]) for i in range(len(widths)))
                )
                for name in ("mine", "theirs")
            )
            if op_name == "pack_rows":
                packed, offsets = op(streams), stream_offsets(streams)
                return tuple(
                    packed[start : start + count * stream.row_bytes].view(count, stream.row_bytes)
                    for start, stream in zip(offsets[:-1], streams, strict=True)
                )
            received = torch.cat([exchange.pack_rows(s) for s in (streams, theirs)])
            return tuple(
                part
                for buffer in op(received, streams)
                for part in buffer.unflatten(0, (4, count)).unbind()
            )

        return Inputs(rows=rows, call=call)

    return make


def copied(widths: tuple[int, ...]) -> Make:
    """Several lists of rows, each to places of its own in another order."""

    def make(count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        rows = {
            f"list{i}": torch.randn(count, width, device=device).to(dtype)
            for i, width in enumerate(widths)
        }

        def call(op: Op, rows: Rows) -> tuple[Tensor, ...]:
            count = rows["list0"].shape[0]
            order = torch.arange(count, device=device)
            copies = tuple(
                RowCopy(
                    source=part,
                    source_index=order,
                    target=part.new_empty(count, part.shape[1] + 16)[:, 16:],
                    target_index=order.flip(0),
                )
                for part in rows.values()
            )
            op(copies)
            return tuple(one.target.flip(0) for one in copies)

        return Inputs(rows=rows, call=call)

    return make


def cases() -> Iterator[Case]:
    """All of them."""
    fused = "tests/kernels/test_qkv_norm_rope_gpu.py"
    for name, heads, dim, rope, index_heads, dtype in (
        ("flash", 64, 512, 64, 64, FP8),
        ("pro", 128, 512, 64, 0, FP8),
        ("odd", 5, 80, 16, 3, CacheDtype.FP32),
    ):
        yield Case(
            op="qkv_norm_rope",
            name=name,
            make=qkv(heads, dim, rope, index_heads, dtype),
            proof=fused,
            cpu=name == "odd",
        )
    csa = (layout(LATENT, FP8, 64, 512, 64), layout(INDEX, FP8, 64, 128, 0))
    odd = (layout(LATENT, CacheDtype.FP32, 64, 80, 16),)
    for name, ratio, layouts, rope, steps in (
        ("csa", 4, csa, 64, 1),
        ("csa mtp", 4, csa, 64, 3),
        ("hca", 128, csa[:1], 64, 1),
        ("hca mtp", 128, csa[:1], 64, 3),
        ("odd", 4, odd, 16, 2),
    ):
        yield Case(
            op="compress_decode",
            name=name,
            make=compress_decode(ratio, layouts, rope, steps),
            proof="tests/kernels/test_compress_decode_gpu.py",
            no_graph="dims that no model has run the torch twin, which looks at the rows"
            if name == "odd"
            else "",
            cpu=name == "odd",
        )
    for name, vocab, offset, size, with_peak in (
        ("whole", 129280, 0, 129280, False),
        ("rank 7", 16160, 113120, 129280, True),
        ("odd", 1003, 2000, 2900, True),
    ):
        yield Case(
            op="sample_partial",
            name=name,
            make=sample_partial(vocab, offset, size, with_peak),
            proof="tests/kernels/test_sample_partial_gpu.py",
            big=name == "rank 7",
            cpu=name == "odd",
        )
    for name, ranks in (("eight", 8), ("three", 3)):
        yield Case(
            op="merge_samples",
            name=name,
            make=merge_samples(ranks),
            proof="tests/kernels/test_sample_partial_gpu.py",
            cpu=ranks == 3,
        )
    for name, widths in (("real", (512, 1024, 2560)), ("odd", (5, 3))):
        yield Case(
            op="copy_rows",
            name=name,
            make=copied(widths),
            proof="tests/kernels/test_row_exchange_gpu.py",
            big=name == "real",
            cpu=name == "odd",
        )
    for op in ("pack_rows", "unpack_rows"):
        for name, widths in (("real", (1024, 512, 256)), ("odd", (5, 3))):
            yield Case(
                op=op,
                name=name,
                make=exchanged(op, widths),
                proof="tests/kernels/test_row_exchange_gpu.py",
                big=name == "real",
                cpu=name == "odd",
            )
