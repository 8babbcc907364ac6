"""Work that runs beside the caller's on the same GPU.

The kernels of a decode step are short and leave most of the chip idle: two chains that do not need
each other take the time of the longer one. Inside a captured step a branch of the graph comes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def beside(device: torch.device, work: Callable[[], Result]) -> Callable[[], Result]:
    """Start ``work`` on the device's side stream, after all that the caller has queued so far.

    What is started this way runs in order among itself. On a CPU ``work`` runs here and now.

    Args:
        device: where the tensors of ``work`` are.
        work: queues kernels; must not wait for the device. It must read nothing that the caller's
            stream writes before the join, and write nothing that it reads. No collectives, and no op that
            keeps a workspace per device (``moe_gate``, ``hc_*``). Variables that it closes over must keep
            their values until the join.

    Returns:
        The join, to be called exactly once, on the caller's stream: lets that stream wait for the
        work and gives its result. What ``work`` refers to is kept until then.
    """
    if device.type != "cuda":
        result = work()
        return lambda: result
    side, caller = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(caller)
    try:
        with torch.cuda.stream(side):
            result = work()
    except BaseException:
        caller.wait_stream(side)  # what was queued still reads its inputs
        raise

    def join() -> Result:
        # ``work`` is named here so that its inputs outlive the kernels that read them.
        _ = work
        caller.wait_stream(side)
        return result

    return join
