"""From a weight plan to tensors on the device, each of which the model takes exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.weight import BlockWeight
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import FP8_BLOCK, WeightSlice, plan_bytes, slice_bytes


class WeightUseError(LookupError):
    """The model's code asked for a weight twice, for one it does not hold, or left one unused."""


class WeightSource(Protocol):
    """Where slices come from: a ``Checkpoint`` or a ``RandomSource``."""

    @property
    def config(self) -> DeepSeekV4Config:
        """The config that the weights belong to."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to print about these weights."""
        ...

    def order(self, plan: Iterable[WeightSlice]) -> list[WeightSlice]:
        """The plan in the order that reads fastest."""
        ...

    def read(self, item: WeightSlice) -> Tensor:
        """The slice, contiguous, in the dtype of ``TORCH_DTYPES``."""
        ...

    def close(self) -> None:
        """Give up file maps."""
        ...


class WeightDict:
    """A rank's weights by checkpoint name. Each name is taken once; ``finish`` proves that all were.

    Taking removes: a norm applied twice, or never, would be a bug that no shape check sees.
    """

    def __init__(self, tensors: dict[str, Tensor], plan: Iterable[WeightSlice]) -> None:
        self._tensors = tensors
        self._slices = {item.name: item for item in plan}
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def has(self, name: str) -> bool:
        """Whether the name is there and not taken yet."""
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """Take a bf16, float32 or int64 tensor.

        Raises:
            WeightUseError: unknown or taken name, or a tensor that has a scale (see ``block``).
        """
        if name in self._slices and self._slices[name].spec.dtype in ("F8_E4M3", "I8", "F8_E8M0"):
            raise WeightUseError(f"{name} is {self._slices[name].spec.dtype}: take it with block()")
        return self._take(name)

    def block(self, name: str) -> BlockWeight:
        """Take a 2-D ``.weight`` with its ``.scale``; bf16 and float32 weights have none.

        Raises:
            WeightUseError: unknown or taken name, or not a 2-D weight.
        """
        item = self._slices.get(name)
        if item is None or not name.endswith(".weight") or len(item.shape) != 2:
            raise WeightUseError(f"{name} is not a 2-D weight of this rank")
        data = self._take(name)
        if item.spec.dtype not in ("F8_E4M3", "I8"):
            return BlockWeight(data)
        scale = self._take(name.removesuffix(".weight") + ".scale")
        if item.spec.dtype == "I8":
            return BlockWeight(data, scale)
        return BlockWeight(
            data,
            scale,
            row_offset=item.rows[0] % FP8_BLOCK if item.rows else 0,
            col_offset=item.cols[0] % FP8_BLOCK if item.cols else 0,
        )

    def finish(self) -> None:
        """Check that everything was taken.

        Raises:
            WeightUseError: the names that were not.
        """
        if self._tensors:
            shown = ", ".join(sorted(self._tensors)[:8])
            raise WeightUseError(f"{len(self._tensors)} weights were never taken: {shown}")

    def _take(self, name: str) -> Tensor:
        if name not in self._tensors:
            why = "was taken already" if name in self._slices else "is not held by this rank"
            raise WeightUseError(f"{name} {why}")
        return self._tensors.pop(name)


def load_weights(
    plan: Sequence[WeightSlice],
    source: WeightSource,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> WeightDict:
    """Bring the slices of ``plan`` to ``device`` and release the source's file maps.

    Args:
        plan: what this rank holds, from ``weight_plan`` of the source's config.
        source: checkpoint or random weights.
        device: where the tensors go.
        progress: called after each slice with bytes done and bytes in all.

    Raises:
        CheckpointError: values that no checkpoint may hold.
    """
    total, done = plan_bytes(plan), 0
    tensors: dict[str, Tensor] = {}
    for item in source.order(plan):
        tensors[item.name] = source.read(item).to(device)
        done += slice_bytes(item)
        if progress is not None:
            progress(done, total)
    source.close()
    return WeightDict(tensors, plan)
