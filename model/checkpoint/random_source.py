"""Random weights of any config in the checkpoint's own formats, made on the device.

Every tensor has a generator of its own, seeded by the user's seed and the tensor's name, and is made
whole before it is cut: the weights do not depend on the mesh. They do depend on the kind of device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from model.checkpoint.checkpoint import TORCH_DTYPES
from model.deepseek_v4.config import DeepSeekV4Config
from model.deepseek_v4.weights import FP8_BLOCK, TensorSpec, WeightSlice, inventory

# Root mean square of the 16 E2M1 codes, taken uniformly: sqrt(8.5625).
_FP4_RMS: Final = math.sqrt(sum(v * v for v in (0.5, 1, 1.5, 2, 3, 4, 6)) / 8)
_FP8_MAX: Final = 448.0
_SCALE_BIAS: Final = 127


class RandomSource:
    """Weights from a seed. Activations stay near size 1 at any depth, logits near a unit normal.

    Args:
        config: the shape.
        seed: equal seeds give equal weights on one kind of device.
        device: where the tensors are made.
    """

    def __init__(self, config: DeepSeekV4Config, seed: int, device: torch.device) -> None:
        self.config = config
        self.notes: tuple[str, ...] = (f"random weights, seed {seed}",)
        self._seed = seed
        self._device = device
        self._specs = inventory(config)

    def order(self, plan: Iterable[WeightSlice]) -> list[WeightSlice]:
        """The plan as it is."""
        return list(plan)

    def read(self, item: WeightSlice) -> Tensor:
        """The slice on the device, contiguous, in the dtype of ``TORCH_DTYPES``."""
        tensor = self._whole(item.spec)
        if item.rows is None and item.cols is None:
            return tensor
        if item.rows is not None:
            tensor = tensor[item.rows[0] : item.rows[1]]
        if item.cols is not None:
            tensor = tensor[:, item.cols[0] : item.cols[1]]
        return tensor.clone(memory_format=torch.contiguous_format)  # let go of the whole

    def close(self) -> None:
        """Nothing is open."""

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(device=self._device)
        return generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _whole(self, spec: TensorSpec) -> Tensor:
        if spec.dtype == "F8_E8M0":
            return self._scale(spec)
        if spec.dtype == "F8_E4M3":
            return self._fp8(spec)
        if spec.dtype == "I8":
            generator = self._generator(spec.name)
            return torch.randint(
                -128, 128, spec.shape, generator=generator, dtype=torch.int8, device=self._device
            )
        if spec.dtype == "I64":
            return self._expert_table(spec)
        mean, std = _distribution(spec)
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=self._device)
        return tensor.normal_(mean, std, generator=self._generator(spec.name))

    def _fp8(self, spec: TensorSpec) -> Tensor:
        """Normal values; the block's scale is divided out, so every block has the same deviation."""
        _, ratio = _fp8_exponent(spec.shape[1])
        values = torch.empty(spec.shape, dtype=torch.float32, device=self._device)
        values.normal_(0.0, ratio, generator=self._generator(spec.name))
        step = self._fp8_steps(self._specs[spec.name.removesuffix(".weight") + ".scale"])
        factor = torch.exp2(-step.float()).repeat_interleave(FP8_BLOCK, dim=1)[:, : spec.shape[1]]
        for block in range(factor.shape[0]):
            values[block * FP8_BLOCK : (block + 1) * FP8_BLOCK].mul_(factor[block])
        return values.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)

    def _fp8_steps(self, spec: TensorSpec) -> Tensor:
        """Which of two neighbouring exponents each 128x128 block has: 0 or 1."""
        generator = self._generator(spec.name)
        return torch.randint(
            0, 2, spec.shape, generator=generator, dtype=torch.uint8, device=self._device
        )

    def _scale(self, spec: TensorSpec) -> Tensor:
        weight = self._specs[spec.name.removesuffix(".scale") + ".weight"]
        if weight.dtype == "F8_E4M3":
            return self._fp8_steps(spec) + (_SCALE_BIAS + _fp8_exponent(weight.shape[1])[0])
        # Uniform nibbles under two scales, 4 apart, mixed so that the mean square is 1 / fan_in.
        target = 1 / math.sqrt(2 * weight.shape[1]) / _FP4_RMS
        high = math.ceil(math.log2(target) + 0.5)
        share = ((target / 2.0**high) ** 2 - 1 / 16) * 16 / 15
        draw = torch.rand(spec.shape, generator=self._generator(spec.name), device=self._device)
        low = (draw >= share).to(torch.uint8)
        return (_SCALE_BIAS + high) - 2 * low

    def _expert_table(self, spec: TensorSpec) -> Tensor:
        """``tid2eid``: distinct experts per row, a random start and a random stride apart."""
        experts, chosen = self.config.n_routed_experts, spec.shape[1]
        widest = (experts - 1) // (chosen - 1) if chosen > 1 else 1
        generator = self._generator(spec.name)
        rows = (spec.shape[0], 1)
        start = torch.randint(0, experts, rows, generator=generator, device=self._device)
        stride = torch.randint(1, widest + 1, rows, generator=generator, device=self._device)
        return (start + stride * torch.arange(chosen, device=self._device)) % experts


def _fp8_exponent(fan_in: int) -> tuple[int, float]:
    """The lower block exponent, and the deviation of the e4m3 values under it (64 to 128)."""
    std = 1 / math.sqrt(fan_in)
    exponent = math.floor(math.log2(std / 64))
    return exponent, std / 2.0**exponent


def _distribution(spec: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation of an unquantised tensor."""
    name = spec.name
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name == "embed.weight":
        return 0.0, 1.0
    if name.endswith(".gate.bias"):
        return 0.0, 0.1
    if name.endswith("_scale"):  # of a hyper-connection
        return 0.5, 0.05
    if len(spec.shape) == 2 and not name.endswith(".ape"):
        return 0.0, 1 / math.sqrt(spec.shape[1])
    return 0.0, 0.5  # attn_sink, ape, hyper-connection bases
