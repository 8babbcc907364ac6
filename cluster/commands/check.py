"""``check``: is this config runnable here, and what would it look like? Starts nothing."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import groupby
from pathlib import Path

from rich.console import Console

from cluster.commands.common import (
    add_config_arguments,
    config_from,
    human_bytes,
    output_console,
    table,
)
from cluster.commands.exits import EXIT_OK, InputError
from cluster.commands.serving import settle_drafts
from cluster.config import ClusterConfig, dump
from cluster.mesh_view import cut_picture, decode_slices, mesh_picture, rank_views, span
from cluster.tokenizer import Tokenizer
from model.deepseek_v4.config import CSA_RATIO, HCA_RATIO, DeepSeekV4Config
from model.parallel.partition import Chunk
from worker.report import (
    MemoryReport,
    PlatformError,
    RankMemory,
    device_memory,
    inspect_model,
    kernel_gaps,
    kernel_table,
    memory_report,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Validate config and checkpoint, print the plan."""
    config = config_from(args)
    try:
        device, memory = device_memory(config.device)
    except PlatformError as err:
        raise InputError(str(err)) from err
    model = inspect_model(config.worker())
    config = settle_drafts(config, model.config)
    worker = config.worker()
    if config.model.path:
        Tokenizer.load(Path(config.model.path))  # a CheckpointError where it is there but unusable
    budget = None if memory is None else int(memory * config.kv_cache.memory_fraction)
    report = memory_report(worker, model.config, budget)
    console = output_console()
    console.print("configuration", style="bold")
    console.print(dump(config), soft_wrap=True)
    for note in model.notes:
        console.print(note, soft_wrap=True)
    console.print(f"device: {device}")
    print_model(console, model.config)
    print_mesh(console, config, model.config)
    print_memory(console, report)
    console.print(table("ops", ("op", "implementation", "why"), kernel_table(config.device)))
    gaps = kernel_gaps(config.device)
    if gaps:
        console.print(f"no GPU implementation, the torch twin runs: {', '.join(gaps)}")
    return EXIT_OK


def print_model(console: Console, model: DeepSeekV4Config) -> None:
    """One line about the shape."""
    kinds = Counter(model.compress_ratios)
    console.print(
        f"model: {model.num_hidden_layers} layers ({kinds[0]} sliding, {kinds[CSA_RATIO]} CSA,"
        f" {kinds[HCA_RATIO]} HCA), hidden {model.hidden_size}, {model.num_attention_heads} heads x"
        f" {model.head_dim}, {model.n_routed_experts} experts top-{model.num_experts_per_tok},"
        f" {model.num_mtp_layers} MTP block(s), vocabulary {model.vocab_size}\n",
        soft_wrap=True,
    )


def print_mesh(console: Console, config: ClusterConfig, model: DeepSeekV4Config) -> None:
    """The grid of ranks, what each holds, and the cut of one full chunk."""
    parallel = config.parallel
    if parallel.world <= 64:
        console.print(mesh_picture(parallel))
    rows = [
        (
            view.rank,
            view.cp_rank,
            view.tp_rank,
            span(view.heads),
            span(view.groups),
            span(view.decode_heads),
            span(view.decode_groups),
            span(view.experts),
        )
        for view in rank_views(model, parallel)
    ]
    columns = ("rank", "cp", "tp", "heads", "groups", "decode heads", "decode groups", "experts")
    console.print(table("who holds what", columns, rows))
    slices = decode_slices(model, parallel)
    view = "the whole world" if slices == parallel.world else "the tp group (cp ranks repeat it)"
    console.print(f"decode slices heads and groups over {view}\n")
    if parallel.cp > 1:
        tokens = config.scheduler.max_batched_tokens
        console.print(f"the cut of a prefill chunk of {tokens} tokens")
        console.print(cut_picture([Chunk(0, tokens)], parallel) + "\n")


def print_memory(console: Console, report: MemoryReport) -> None:
    """Bytes per rank and what they hold."""
    groups: list[tuple[str, RankMemory]] = []
    for _, members in groupby(report.ranks, key=lambda r: r.weights):
        same = list(members)
        groups.append((span((same[0].rank, same[-1].rank + 1)), same[0]))
    rows = [
        (
            ranks,
            human_bytes(rank.weights),
            human_bytes(rank.slots),
            human_bytes(rank.tails),
            human_bytes(rank.pools),
            human_bytes(rank.total),
        )
        for ranks, rank in groups
    ]
    title = "memory per rank (weights as they are held: on a GPU, as its kernels read them)"
    columns = ("ranks", "weights", "slots", "tails", "KV pools", "total")
    console.print(table(title, columns, rows))
    size, spec = report.size, report.spec
    console.print(
        f"KV cache {spec.dtype.value}: {size.num_blocks} blocks of {spec.block_size} tokens ="
        f" {report.kv_tokens} tokens; {size.num_slots} requests at once, {size.num_tails} tails;"
        f" longest request {size.max_model_len} tokens\n",
        soft_wrap=True,
    )
