"""Every op of the dispatch table: its cases, or why it has none."""

from __future__ import annotations

from tests.kernels.op_cases import attention, fused, pages, products, rows
from tests.kernels.op_cases.base import Case

CASES: tuple[Case, ...] = tuple(
    case for part in (rows, products, pages, attention, fused) for case in part.cases()
)

# Op -> why no test on a GPU asks whether the batch changes its rows.
EXEMPT: dict[str, str] = {
    "dequant_fp4": "runs at load time on weights, value by value; there is no batch",
    "dequant_fp8": "runs at load time on weights, value by value; there is no batch",
    "quant_fp8_weight": "makes weights for tests and conversions; there is no batch",
    "peer_sum": "adds value by value over ranks; there is no batch (test_peer_sum_gpu.py)",
    "prepare_weight": "runs at load time; what it makes is proved by the cases of linear",
    "prepare_experts": "runs at load time; what it makes is proved by the cases of expert_ffn",
}
