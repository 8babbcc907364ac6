"""A Ray to join that is not there."""

from __future__ import annotations

import socket

import pytest

from cluster.config import RayConfig
from cluster.errors import ConfigError
from cluster.ray_runtime import RayRuntime


@pytest.mark.ray
def test_unreachable_address_is_refused_at_once() -> None:
    with socket.socket() as held:  # bound, not listening: nobody answers
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        runtime = RayRuntime(RayConfig(address=address), cpus=1, cpu_only=True)
        with pytest.raises(ConfigError, match=f"cluster.ray.address = {address}"):
            runtime.ensure()
