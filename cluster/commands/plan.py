"""``plan``: would this model run on that machine, and what would travel? Needs neither of them."""

from __future__ import annotations

import argparse
from dataclasses import replace

from cluster.commands.check import print_memory, print_mesh, print_model
from cluster.commands.common import (
    add_config_arguments,
    config_from,
    human_bytes,
    output_console,
    say,
    table,
)
from cluster.commands.exits import EXIT_OK, InputError
from cluster.config import ClusterConfig
from cluster.traffic import GATHERS, Traffic, expert_traffic, prefill_gather
from model.checkpoint.source import load_config
from worker.report import MemoryReport, memory_report, wire_itemsize

_GIB = 1 << 30
_GPUS = 4  # of a machine when neither arguments nor mesh say
_MOST = 1 << 20  # of nodes, GPUs, GiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="machines (cluster.nodes)")
    parser.add_argument(
        "--gpus", type=int, metavar="G", help="GPUs per machine (those of the mesh, 4 without one)"
    )
    parser.add_argument("--gib", type=float, default=139, metavar="M", help="GiB per GPU (139)")


def run(args: argparse.Namespace) -> int:
    """Print memory per rank, the KV tokens that fit, and the bytes of every gather."""
    config = config_from(args)
    world = config.parallel.world
    nodes = config.cluster.nodes if args.nodes is None else args.nodes
    for name, value in (("--nodes", nodes), ("--gpus", args.gpus), ("--gib", args.gib)):
        if value is not None and not 0 < value <= _MOST:
            raise InputError(f"{name} {value}: must be above 0 and at most {_MOST}")
    gpus = args.gpus or (max(1, world // nodes) if world > 1 else _GPUS)
    config = _with_mesh(config, nodes * gpus)
    model = load_config(path=config.model.path, shape=config.model.shape)
    worker = config.worker()
    budget = int(args.gib * _GIB * config.kv_cache.memory_fraction)
    report = memory_report(worker, model, budget)
    console = output_console()
    console.print(
        f"machine: {nodes} node(s) x {gpus} GPU(s) x {args.gib:g} GiB,"
        f" of which {config.kv_cache.memory_fraction:.0%} may be used",
        soft_wrap=True,
    )
    print_model(console, model)
    print_mesh(console, config, model)
    print_memory(console, report)
    tokens = config.scheduler.max_batched_tokens
    rows = [
        (
            item.name,
            human_bytes(item.inside),
            human_bytes(item.between),
            human_bytes(item.inside / tokens),
            human_bytes(item.between / tokens),
        )
        for item in _traffic(config, report, wire_itemsize(worker), nodes)
    ]
    columns = ("what", "inside nodes", "between nodes", "inside / token", "between / token")
    console.print(
        table(f"bytes moved by a prefill chunk of {tokens} tokens, all layers", columns, rows)
    )
    return EXIT_OK


def _with_mesh(config: ClusterConfig, world: int) -> ClusterConfig:
    """The mesh of the config, or all GPUs context-parallel when it names none."""
    parallel = config.parallel
    if parallel.world == 1 and world > 1:
        say(f"parallel.cp and parallel.tp not given: planning with cp {world}, tp 1")
        parallel = replace(parallel, cp=world)
        return replace(config, parallel=parallel)
    if parallel.world != world:
        raise InputError(
            f"parallel.cp {parallel.cp} x parallel.tp {parallel.tp} = {parallel.world} ranks,"
            f" but the machine has {world} GPUs (--nodes x --gpus)"
        )
    return config


def _traffic(
    config: ClusterConfig, report: MemoryReport, itemsize: int, nodes: int
) -> list[Traffic]:
    tokens, parallel = config.scheduler.max_batched_tokens, config.parallel
    gathers = [
        prefill_gather(report.spec, gather, tokens=tokens, start=0, itemsize=itemsize, nodes=nodes)
        for gather in GATHERS
    ]
    experts = expert_traffic(
        report.spec.config, parallel, tokens=tokens, itemsize=itemsize, nodes=nodes
    )
    return [*gathers, experts]
