"""What each kind of row is judged by: the lines of "how it is judged" in issue 3."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.case import COPY_TBPS


class Figure(enum.Enum):
    """What a line looks at."""

    TFLOPS = "TF/s"
    US = "us"
    SHARE = "of copy rate"
    LIBRARY = "of DeepGEMM"

    @property
    def less_is_better(self) -> bool:
        """Times are; the others are rates."""
        return self is Figure.US


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One figure to reach; for a time, ``plus_weight`` adds what reading an FP8 weight takes."""

    figure: Figure
    value: float
    plus_weight: bool = False


Goals = tuple[Goal, ...]  # any one of them is enough


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table.

    Args:
        name: in words.
        rows: op -> regular expression for the start of the shape of the rows it judges.
        served: must of what serves the op (an optional backend, where installed and faster).
        own: must of the own kernel.
        target: what the own kernel should reach.
        backends_serve: whether steps reach the op's optional backend, where it is installed.
    """

    name: str
    rows: Mapping[str, str]
    served: Goals
    own: Goals
    target: Goals = ()
    backends_serve: bool = True

    def judges(self, op: str, shape: str) -> bool:
        """Whether a row belongs to this line."""
        pattern = self.rows.get(op)
        return pattern is not None and re.match(pattern, shape) is not None


def _goals(figure: Figure, value: float) -> Goals:
    return (Goal(figure=figure, value=value),)


def _either(share: float, tflops: float) -> Goals:
    return (
        Goal(figure=Figure.SHARE, value=share),
        Goal(figure=Figure.TFLOPS, value=tflops),
    )


_MEMORY_BOUND = (
    *("compress_insert", "kv_insert", "rms_norm", "rms_norm_quant", "swiglu_quant", "quant_rows"),
    *("hc_pre", "hc_post", "hc_post_pre", "hc_pre_norm", "hc_post_pre_norm", "qkv_norm_rope"),
)
_SMALL = (
    *_MEMORY_BOUND,
    *("q_norm_rope", "kv_norm_rope", "index_query", "moe_gate", "moe_permute", "moe_unpermute"),
    *("compress_decode", "moe_permute_quant", "swiglu", "hc_head", "apply_rope"),
)

LINES = (
    Line(
        name="fp8 block GEMM, M >= 1024",
        rows={"linear_quant": r".* M=(1024|4096) "},
        served=_goals(Figure.LIBRARY, 1.0),
        own=_goals(Figure.LIBRARY, 0.75),
        target=_goals(Figure.LIBRARY, 1.0),
    ),
    Line(
        name="fp8 block GEMM, M <= 128: served weight bytes / 4.27 TB/s + 6 us, own against DeepGEMM",
        rows={"linear_quant": r".* M=(1|16|128) "},
        served=(Goal(figure=Figure.US, value=6.0, plus_weight=True),),
        own=_goals(Figure.LIBRARY, 0.75),
        target=_goals(Figure.LIBRARY, 1.1),
    ),
    Line(
        name="grouped MoE GEMM pair, 49,152 rows over 64 local experts (FP8)",
        rows={"expert_ffn_quant": r"pair, prefill"},
        served=_goals(Figure.TFLOPS, 1100.0),
        own=_goals(Figure.TFLOPS, 700.0),
        target=_goals(Figure.TFLOPS, 1150.0),
    ),
    Line(
        name="grouped MoE, decode (8-128 tokens), products of FP8 weights",
        rows={"expert_ffn_quant": r"(pair|w1\|w3|w2), \d+ tokens"},
        served=_goals(Figure.SHARE, 0.80),
        own=_goals(Figure.SHARE, 0.65),
        target=_goals(Figure.SHARE, 0.85),
    ),
    Line(
        name="grouped MoE from FP4 weights, prefill: 2x Marlin's 246 TF/s",
        rows={"expert_ffn_quant": r"whole, FP4 weights, prefill"},
        served=_goals(Figure.TFLOPS, 492.0),
        own=_goals(Figure.TFLOPS, 492.0),
    ),
    Line(
        name="index score, prefill 4K x 32K keys",
        rows={"index_score": r"4096 rows, 1 sequences of 32768"},
        served=_goals(Figure.TFLOPS, 1000.0),
        own=_goals(Figure.TFLOPS, 700.0),
        target=_goals(Figure.TFLOPS, 1050.0),
        backends_serve=False,  # the model selects by index_topk, which scores with the own kernel
    ),
    Line(
        name="top-k 512: 1024 rows of 64K",
        rows={"topk_select": r"1024 x 65536, k 512"},
        served=_goals(Figure.US, 150.0),
        own=_goals(Figure.US, 150.0),
        target=_goals(Figure.US, 60.0),
    ),
    Line(
        name="top-k 512: 1-8 rows of 256K",
        rows={"topk_select": r"[18] x 262144, k 512"},
        served=_goals(Figure.US, 40.0),
        own=_goals(Figure.US, 40.0),
        target=_goals(Figure.US, 15.0),
    ),
    Line(
        name="sparse attention prefill: CSA (512 + window)",
        rows={"sparse_attention": r"prefill CSA: 4096 rows, 64 heads"},
        served=_goals(Figure.TFLOPS, 450.0),
        own=_goals(Figure.TFLOPS, 300.0),
        target=_goals(Figure.TFLOPS, 490.0),
    ),
    Line(
        name="sparse attention prefill: window + HCA",
        rows={"sparse_attention": r"prefill HCA"},
        served=_goals(Figure.TFLOPS, 450.0),
        own=_goals(Figure.TFLOPS, 450.0),
        target=_goals(Figure.TFLOPS, 600.0),
    ),
    Line(
        name="sparse attention decode, 64 heads, fp8 pages, batch 32: bandwidth or TF/s",
        rows={
            "sparse_attention": r"decode (CSA: 32 rows, 64 heads|HCA: 32 rows, 64 heads, 128 \+ 1024)"
        },
        served=_either(0.50, 200.0),
        own=_either(0.50, 200.0),
        target=_either(0.75, 350.0),
    ),
    Line(
        name="memory-bound ops at 16K rows, share of copy bandwidth",
        rows=dict.fromkeys(_MEMORY_BOUND, r"(16384(x| rows| tokens)|\w+:? (4096|128) entries)"),
        served=_goals(Figure.SHARE, 0.70),
        own=_goals(Figure.SHARE, 0.70),
        target=_goals(Figure.SHARE, 0.85),
    ),
    Line(
        name="fused small ops at 1-32 rows, graph-timed",
        rows=dict.fromkeys(
            _SMALL, r"((csa|index|hca):? |ratio \d+, )?(1|8|32)(x| rows| tokens| entries)"
        ),
        served=_goals(Figure.US, 8.0),
        own=_goals(Figure.US, 8.0),
        target=_goals(Figure.US, 4.0),
    ),
)


def figure_of(figure: Figure, row: Mapping[str, object]) -> float | None:
    """The value of one row (a dict with the keys of ``report.Row``); None where it was not measured."""
    us = float(str(row["us"]))
    if figure is Figure.US:
        return us
    if figure is Figure.SHARE:
        # The issue counts bandwidth: the share of the copy rate, even where operations set the limit.
        tbps = row["tbps"]
        return None if tbps is None else float(str(tbps)) / COPY_TBPS
    key = "tflops" if figure is Figure.TFLOPS else "library_us"
    value = row[key]
    if value is None:
        return None
    return float(str(value)) if figure is Figure.TFLOPS else float(str(value)) / us


def weight_us(shape: str) -> float:
    """Microseconds that an FP8 weight ``N=... K=...`` takes at the copy rate; 0 for other shapes."""
    sizes = re.search(r"N=(\d+) K=(\d+)", shape)
    return 0.0 if sizes is None else int(sizes[1]) * int(sizes[2]) / COPY_TBPS / 1e6
