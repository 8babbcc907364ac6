"""A rank without a model or torch: what the control plane drives in its own tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from model.parallel.config import MeshCoord
from worker.config import WorkerConfig
from worker.protocol import CacheInfo, SliceOutput, StepOutput, StepPlan


class FakeWorker:
    """Answers every prefill slice with its pid, where it was told to join, and its environment."""

    def __init__(self, config: WorkerConfig, coord: MeshCoord, device_index: int) -> None:
        self.config = config
        self.coord = coord
        self.device_index = device_index
        self.init_method = ""

    def init_distributed(self, init_method: str) -> None:
        self.init_method = init_method

    def load(self, progress: Callable[[int, int], None]) -> None:
        for i in range(4):
            progress(i, 4)
        print("fake weights loaded", flush=True)

    def init_cache(self) -> CacheInfo:
        return CacheInfo(
            num_blocks=8,
            block_size=self.config.kv_cache.block_size,
            num_slots=self.config.scheduler.max_num_seqs,
            num_tails=1,
            max_model_len=512,
            allocated_bytes=1000 + self.coord.rank,
            weight_bytes=0,
        )

    def warm_up(self) -> None:
        return

    def execute(self, plan: StepPlan) -> StepOutput:
        outputs = []
        if self.coord.rank == 0:
            outputs = [
                SliceOutput(
                    request_id=piece.request_id,
                    token_ids=[sum(piece.token_ids)],
                    logits=bytes(piece.start),
                )
                for piece in plan.prefill
            ]
        return StepOutput(step_id=plan.step_id, rank=self.coord.rank, outputs=outputs)

    def close(self) -> None:
        return


class TellingWorker(FakeWorker):
    """Every rank's step answer is preceded by a line with its facts in its output."""

    def warm_up(self) -> None:
        facts = {
            "rank": self.coord.rank,
            "model_path": self.config.model.path,
            "device_index": self.device_index,
            "omp": os.environ["OMP_NUM_THREADS"],
            "init_method": self.init_method,
        }
        print("FACTS", facts, flush=True)


class PidWorker(FakeWorker):
    """Writes its pid where the test finds it."""

    def warm_up(self) -> None:
        folder = Path(os.environ["GLOO_TEST_PID_DIR"])
        (folder / f"pid{self.coord.rank}").write_text(str(os.getpid()))


class LoadError(FakeWorker):
    """Rank 1 cannot load."""

    def load(self, progress: Callable[[int, int], None]) -> None:
        if self.coord.rank == 1:
            raise ValueError("tensor layers.0.attn.wq_a.weight is missing")
        time.sleep(60)


class SlowLoad(FakeWorker):
    """Never gets its weights."""

    def load(self, progress: Callable[[int, int], None]) -> None:
        time.sleep(60)


class Uneven(FakeWorker):
    """Ranks that do not agree on the number of blocks."""

    def init_cache(self) -> CacheInfo:
        info = super().init_cache()
        return CacheInfo(
            **{
                name: getattr(info, name) + (self.coord.rank if name == "num_blocks" else 0)
                for name in info.__struct_fields__
            }
        )


class StuckAtClose(FakeWorker):
    """Does not leave when asked."""

    def close(self) -> None:
        time.sleep(600)
