"""The page ``configs/README.md``: every key with its type, default, range and meaning.

``python -m cluster.config_reference`` prints it; a test compares the page with what this prints.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from cluster.config import describe_range, leaves

MEANINGS: dict[str, str] = {
    "model.path": "directory of the checkpoint in the official format",
    "model.shape": "`flash`, `pro` or a `config.json`, instead of the checkpoint's own; empty: "
    "`config.json` in `model.path`",
    "model.load_format": "`random` makes weights of the shape from `model.seed`; `auto` loads "
    "whatever `model.path` holds",
    "model.numerics": "`release`: the official rounding steps, what is served; `fp32_rounded`: those "
    "steps with float64 between them, `fp32`: no rounding; both for oracles",
    "model.max_model_len": "tokens of prompt and output together; 0: what the model allows",
    "model.seed": "seed of `load_format: random`; the same weights on every mesh",
    "model.keep_fp4": "on a GPU: FP4 experts stay packed: half the memory, decode reads half the bytes, "
    "prefill expands them at each step; false: they become FP8, bit for bit the same values",
    "device": "`auto` takes CUDA where there is a device, and says so",
    "parallel.cp": "context-parallel size; the world has `cp * tp` ranks, `rank = cp_rank * tp + "
    "tp_rank`",
    "parallel.tp": "tensor-parallel size of the attention; experts are spread over the whole world",
    "parallel.cp_gather": "`compressed`: every rank pools its own entries and only those and the "
    "halos travel; `kv_bf16`: all rows are gathered (the yardstick)",
    "parallel.kv_shard": "`cp`: the main CSA and HCA pages of a block are kept by one cp rank; "
    "`replicate`: by all",
    "parallel.cp_min_tokens": "chunks of fewer tokens go whole to one rank",
    "parallel.moe_combine": "`ordered` adds experts in a fixed order, equal on every mesh; `fast` "
    "adds partial sums of the ranks",
    "parallel.peer_memory": "sums of up to 1 MiB go through memory that the GPUs of one machine map "
    "from each other (CUDA; several machines: NCCL)",
    "parallel.dcp": "decode: split the index scoring over the ranks (few, very long requests)",
    "kv_cache.dtype": "of the pages; `auto`: fp8 with `release`, fp32 otherwise",
    "kv_cache.block_size": "tokens of a logical block, a multiple of 128",
    "kv_cache.num_blocks": "blocks of the whole world; `auto`: what the memory budget holds",
    "kv_cache.tail_interval": "blocks between the saved window tails of a long prompt (a prefix hit "
    "begins at a tail)",
    "kv_cache.num_tails": "saved tails; `auto`: sized with the pools",
    "kv_cache.memory_fraction": "share of the device memory that weights, pools and workspace may "
    "use in all (CUDA)",
    "kv_cache.cpu_bytes": "bytes of pools per rank on the CPU when `num_blocks` is `auto`",
    "scheduler.max_batched_tokens": "tokens of one prefill step, all requests together",
    "scheduler.max_num_seqs": "requests that run at once",
    "scheduler.prefix_cache": "reuse the blocks of equal prompt beginnings",
    "speculative.mtp": "tokens the MTP block drafts per step; 0: off",
    "cuda_graphs": "run decode steps as CUDA graphs, captured per padded shape when it is first seen "
    "(CUDA, `release`, without `parallel.dcp`)",
    "prefill_graphs": "run prefill steps as CUDA graphs from the second step of a shape on, up to 4 shapes "
    "at a time (as `cuda_graphs`; with `moe_combine: fast` where all rows go to all ranks; without "
    "`kv_shard: cp`). Takes memory outside `kv_cache.memory_fraction`: once the workspace of the largest "
    "captured step, and for each shape its result (2 x 4 x hidden size bytes for each token of a rank); "
    "1.2 GB a GPU for V4-Flash on four, steps of 8,192 tokens; more at the end of long prompts",
    "cluster.executor": "`ray`: one actor per rank; `local`: plain processes of this machine",
    "cluster.nodes": "machines the ranks are spread over, equally",
    "cluster.ray.address": "`host:port` of a running Ray to join; empty: start one here and end it "
    "with us",
    "cluster.ray.temp_dir": "directory of the Ray we start (keep it short: sockets live in it); "
    "empty: a new one, removed at the end",
    "cluster.max_rebuilds": "how often the ranks are rebuilt after a failure within "
    "`rebuild_window_s`; one more ends the program",
    "cluster.rebuild_window_s": "seconds after which a rebuild is forgotten",
    "cluster.start_deadline_s": "seconds the whole start may take, loading included",
    "cluster.step_deadline_s": "seconds a step may take before its ranks count as hung",
    "cluster.prefill_deadline_s_per_1k": "seconds added to that for every 1024 prompt tokens of the "
    "step",
    "cluster.heartbeat_s": "seconds between pings while a step or the start runs",
    "cluster.heartbeat_timeout_s": "seconds without an answer before a rank counts as lost, at least "
    "twice `heartbeat_s` (2 minutes during the start, when imports block the answering thread)",
    "cluster.max_message_bytes": "largest message between engine and ranks; larger ones are refused",
    "cluster.log_dir": "directory for the ranks' output, `rankN.log` (local executor; Ray keeps its "
    "own); empty: a temporary one",
    "cluster.failpoints": "faults to rehearse: a rank kills itself (`crash`), sleeps for ever "
    "(`hang`), sleeps `seconds` (`slow`) or raises (`error`) at a step of the `generation`-th life "
    "of the ranks (0: the first start; -1: every)",
}

_HEAD = """# Configuration

One file is one complete run; there is no inheritance. `--set KEY=VALUE` (repeatable, VALUE is YAML)
changes single keys on the command line. Unknown, repeated or mistyped keys are errors that name file,
line and key. `python launch.py check --config FILE` prints the merged result.

| file | what it runs |
|---|---|
| `tiny_cpu_cp2.yaml` | a tiny checkpoint on two CPU ranks, context-parallel; add `--set model.path=DIR` |
| `flash_4xh200.yaml` | DeepSeek V4 Flash on one machine with four H200 |
| `pro_8xh200_2nodes.yaml` | DeepSeek V4 Pro on two machines with eight H200 each |

This page is printed by `python -m cluster.config_reference`.

| key | type | default | range | meaning |
|---|---|---|---|---|
"""


def reference_page() -> str:
    """The whole page as Markdown."""
    rows = [
        f"| `{key}` | {kind} | {_shown(default)} | {describe_range(key)} | {MEANINGS[key]} |"
        for key, (kind, default) in (
            (k, (t.replace("|", "\\|"), d)) for k, (t, d) in leaves().items()
        )
    ]
    return _HEAD + "\n".join(rows) + "\n"


def _shown(default: Any) -> str:
    return f"`{msgspec.json.encode(default).decode()}`"


if __name__ == "__main__":
    sys.stdout.write(reference_page())
