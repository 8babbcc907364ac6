"""The shape of a batch: all of it that is not the contents of its tensors.

A batch is a tree of dataclasses, dicts and tuples. Its tensors are what a captured step reads anew at each
replay; everything else (row counts, None, shapes) is baked into the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor

Batch = TypeVar("Batch")


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


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Names and parts of one node."""
    if isinstance(value, tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))
    else:
        raise TypeError(f"a batch holds {type(value).__name__}, which has no layout")
