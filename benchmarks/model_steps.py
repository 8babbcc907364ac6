"""Step times of a whole model with random weights on the GPUs of one machine.

    python -m benchmarks.model_steps --shape flash --cp 4 --prefill 8192 32768 --decode 1 8 32

One process per GPU drives ``worker.worker.Worker`` with step plans (no engine, no Ray), so the
figures are those of a step on the ranks: metadata, forward, sampling. Prints the median of several
runs after a warm-up, and with ``--profile`` rank 0's kernels of one step each, by device time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from model.parallel.config import MeshCoord, ParallelConfig
from worker.config import (
    KVCacheConfig,
    ModelSource,
    SchedulerConfig,
    SpeculativeConfig,
    WorkerConfig,
)
from worker.protocol import DecodeSlice, PrefillSlice, SamplingParams, SlotInit, StepPlan
from worker.rendezvous import serve_store
from worker.worker import Worker


def synchronize() -> None:
    """Wait for the device; the CPU (``--device cpu``, to try the script) has nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated_gb(peak: bool) -> float:
    """GB of tensors on this rank's GPU, now or at most so far."""
    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9


class Steps:
    """Step plans for one rank, and the time each takes."""

    def __init__(self, worker: Worker, block_size: int) -> None:
        self.worker, self.block_size, self.step = worker, block_size, 0
        self.random = random.Random(0)

    def prefill(self, slot: int, tokens: int) -> float:
        """A new request of ``tokens`` tokens in ``slot``, in one chunk; seconds."""
        vocab = self.worker.vocab_size
        blocks = -(-(tokens + 64) // self.block_size)
        init = SlotInit(
            request_id=slot, slot=slot, sampling=SamplingParams(), num_prompt_tokens=tokens
        )
        chunk = PrefillSlice(
            request_id=slot,
            slot=slot,
            start=0,
            token_ids=[self.random.randrange(vocab) for _ in range(tokens)],
            block_ids=[slot * blocks + i for i in range(blocks)],
            sample=True,
        )
        return self._run(
            StepPlan(step_id=self.step, phase="prefill", inits=[init], prefill=[chunk])
        )

    def decode(self, batch: int, position: int) -> float:
        """One token for each of the first ``batch`` slots; seconds."""
        rows = [
            DecodeSlice(request_id=slot, slot=slot, position=position, num_tokens=1)
            for slot in range(batch)
        ]
        return self._run(StepPlan(step_id=self.step, phase="decode", decode=rows))

    def _run(self, plan: StepPlan) -> float:
        synchronize()
        begin = time.perf_counter()
        self.worker.execute(plan)
        synchronize()
        self.step += 1
        return time.perf_counter() - begin


def run_rank(rank: int, args: argparse.Namespace, init_method: str) -> None:
    """One rank's process."""
    config = WorkerConfig(
        model=ModelSource(
            shape=args.shape,
            load_format="random",
            max_model_len=args.max_len,
            keep_fp4=args.keep_fp4,
        ),
        device=args.device,
        parallel=ParallelConfig(cp=args.cp, tp=args.tp, cp_gather=args.gather),
        kv_cache=KVCacheConfig(num_blocks=args.blocks),
        scheduler=SchedulerConfig(max_num_seqs=max(args.decode), prefix_cache=False),
        speculative=SpeculativeConfig(mtp=0),
        prefill_graphs=not args.launched,
    )
    worker = Worker(config, MeshCoord(cp=args.cp, tp=args.tp, rank=rank), device_index=rank)
    phases: dict[str, float] = {}

    def timed(name: str, begin: float) -> None:
        synchronize()
        phases[name] = time.perf_counter() - begin
        if rank == 0:
            print(f"{name} {phases[name]:.1f} s", flush=True)

    begin = time.perf_counter()
    worker.init_distributed(init_method)
    timed("join", begin)
    begin = time.perf_counter()
    worker.load()
    timed("load", begin)
    info = worker.init_cache()
    begin = time.perf_counter()
    worker.warm_up()
    timed("warm-up", begin)
    if rank == 0:
        print(
            f"weights {info.weight_bytes / 1e9:.1f} GB in checkpoint form, caches"
            f" {info.allocated_bytes / 1e9:.1f} GB, allocated"
            f" {allocated_gb(peak=False):.1f} GB",
            flush=True,
        )
    steps = Steps(worker, config.kv_cache.block_size)
    results: list[dict[str, object]] = []

    def report(phase: str, size: int, seconds: list[float]) -> None:
        row = {"phase": phase, "size": size, "ms": 1e3 * statistics.median(seconds)}
        results.append(row)
        if rank == 0:
            peak = allocated_gb(peak=True)
            print(f"{phase} {size}: {row['ms']:.2f} ms (peak {peak:.1f} GB)", flush=True)

    for tokens in args.prefill:
        for _ in range(2):  # the second step of a shape is captured
            steps.prefill(0, tokens)
        report("prefill", tokens, [steps.prefill(0, tokens) for _ in range(args.repeat)])
    position = args.context
    for batch in args.decode:
        for slot in range(batch):
            steps.prefill(slot, args.context)
        position, times = args.context, []
        for _ in range(args.repeat + 3):
            times.append(steps.decode(batch, position))
            position += 1
        report("decode", batch, times[3:])
    if args.profile:
        profile(rank, steps, position, args)
    if rank == 0 and args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    worker.close()


def profile(rank: int, steps: Steps, position: int, args: argparse.Namespace) -> None:
    """Print rank 0's device time by kernel for a prefill step and the two extreme decode steps."""
    small, large = args.decode[0], args.decode[-1]
    for name, call in (
        (f"decode {large}", lambda: steps.decode(large, position)),
        (f"decode {small}", lambda: steps.decode(small, position + 1)),
        ("prefill", lambda: steps.prefill(0, args.prefill[0])),
    ):
        with torch.profiler.profile() as recorded:
            call()
        if rank == 0:
            events = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)
            total = sum(e.self_device_time_total for e in events)
            print(f"{name}: {total / 1e3:.2f} ms of device time on rank 0", flush=True)
            for event in events[:24]:
                milliseconds = event.self_device_time_total / 1e3
                print(f"  {milliseconds:9.3f} ms {event.count:6d} x {event.key[:84]}", flush=True)


def main() -> None:
    """Parse arguments, start the ranks, wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="flash", help="flash, pro or a config.json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--gather", default="compressed", choices=("compressed", "kv_bf16"))
    parser.add_argument("--keep-fp4", action="store_true", help="leave the experts packed")
    parser.add_argument("--launched", action="store_true", help="prefill without CUDA graphs")
    parser.add_argument("--prefill", type=int, nargs="+", default=[8192])
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-len", type=int, default=1 << 17)
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--context", type=int, default=8192, help="tokens before decode steps")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    store, init_method = serve_store("127.0.0.1", 600)
    mp.spawn(run_rank, args=(args, init_method), nprocs=args.cp * args.tp)
    del store  # it must outlive the ranks


if __name__ == "__main__":
    main()
