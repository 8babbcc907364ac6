"""A batch as a tree of dataclasses, dicts and tuples: its layout, and its tensors in one buffer.

Its tensors are what a captured step reads anew at each replay; everything else (row counts, None, shapes:
the layout) is baked into the capture. The tensors lie in one buffer, so that one copy brings all of them
to the device, and one more to where a captured step reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from model.parallel.ranges import Indices

Batch = TypeVar("Batch")
_WORD, _ALIGN = 8, 2  # bytes of the buffer's numbers; numbers between the starts of tensors


def on_host(values: Indices) -> Tensor:
    """Numbers of a batch, still on the host: all its tensors travel together (``pack``)."""
    return torch.from_numpy(np.ascontiguousarray(values))


def joined(parts: Iterable[Indices]) -> Tensor:
    """Numbers of a batch that were made in parts, perhaps none, as int64."""
    return on_host(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))


def layout_of(value: Any) -> Hashable:
    """Shapes and dtypes of all tensors and everything that is not a tensor, in the tree's order.

    Raises:
        TypeError: something in the tree that is neither of the kinds above nor a number or None.
    """
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), tuple(value.stride()), value.dtype
    if value is None or isinstance(value, int):
        return value
    return tuple((name, layout_of(part)) for name, part in _parts(value))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors, in the tree's order: trees of one layout give as many, pair by pair alike."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None and not isinstance(value, int):
        for _, part in _parts(value):
            yield from tensors_of(part)


def map_tensors(value: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same tree with every tensor replaced by what ``change`` makes of it."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = change(value)
    elif isinstance(value, tuple):
        changed = tuple(map_tensors(part, change) for part in value)
    elif isinstance(value, dict):
        changed = {name: map_tensors(part, change) for name, part in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{k: map_tensors(part, change) for k, part in _parts(value)})
    return cast("Batch", changed)


def pack(batch: Batch, device: torch.device) -> tuple[Batch, Tensor]:
    """A tree of CPU tensors -> the same tree on ``device``, its tensors views of one buffer.

    Returns:
        the tree, and the buffer, int64 [words]. Where each tensor lies follows from the layout. On CUDA
        the copy is queued on the current stream and nothing waits for it.
    """
    parts = [part.numpy() for part in tensors_of(batch)]
    rooms = [_room(part.nbytes) for part in parts]
    host = torch.empty(sum(rooms), dtype=torch.int64, pin_memory=device.type == "cuda")
    words, start = host.numpy(), 0
    for part, room in zip(parts, rooms, strict=True):
        words[start : start + room].view(part.dtype)[: part.size] = part.reshape(-1)
        start += room
    packed = host if device.type == "cpu" else host.to(device, non_blocking=True)
    return place_in(packed, batch), packed


def place_in(packed: Tensor, batch: Batch) -> Batch:
    """The tree with views of ``packed`` [words], which ``pack`` made for a batch of its layout."""
    rooms = [_room(part.nbytes) for part in tensors_of(batch)]
    places = iter(torch.split(packed, rooms))

    def view(part: Tensor) -> Tensor:
        place = next(places)
        if part.dtype != place.dtype:
            place = place.view(part.dtype)
        if part.numel() != place.numel():
            place = place[: part.numel()]
        return place if part.dim() == 1 else place.view(part.shape)

    return map_tensors(batch, view)


def _room(nbytes: int) -> int:
    return -(-nbytes // (_WORD * _ALIGN)) * _ALIGN


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Names and parts of one node."""
    if isinstance(value, tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((name, getattr(value, name)) for name in _names(type(value)))
    else:
        raise TypeError(f"a batch holds {type(value).__name__}, which has no layout")
