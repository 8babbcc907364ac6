"""The Ray that the ranks live in: one of our own, ended with us, or a running one that we join."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray

from cluster.config import RayConfig
from cluster.errors import ConfigError

_LOG = logging.getLogger("causeway.ray")
_OBJECT_STORE_BYTES = 80 << 20  # close to Ray's minimum: no tensor ever goes through Ray
_REACH_S = 5.0  # seconds to wait for a joined Ray's port
_MAX_TEMP_PATH = 40  # sockets live in it, and their paths may have 107 bytes
_LOCAL_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray would run the ranks at 15: behind everything else
}


class RayRuntime:
    """Starts or joins Ray on demand; used by one thread."""

    def __init__(self, config: RayConfig, *, cpus: int, cpu_only: bool) -> None:
        self._config = config
        self._cpus = cpus
        self._cpu_only = cpu_only
        self._ours = False  # we called ray.init
        self._temp: Path | None = None  # a directory that we made
        self._logs: Path | None = None

    def ensure(self) -> str:
        """Have Ray running; gives its address. A Ray this process already uses stays as it is."""
        if not ray.is_initialized():
            self._ours = True
            before = signal.getsignal(signal.SIGTERM)
            if self._config.address:
                _check_reachable(self._config.address)
                ray.init(address=self._config.address, **_quiet())
            else:
                self._start()
            # Ray prints the raylet's complaints to stdout, where only results belong, and has no public
            # switch for it; the failures they tell of reach the user as WorkerFailure.
            ray._private.worker._worker_logs_enabled = False
            # Ray takes SIGTERM for itself; what our process does then is not its business.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
        return str(ray.get_runtime_context().gcs_address)

    def stop(self) -> None:
        """Leave the joined Ray, or end every process of the one we started."""
        if self._ours:
            self._ours = False
            ray.shutdown()
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)
            self._temp = None

    def node_id(self) -> str:
        """Ray's name of this machine."""
        return str(ray.get_runtime_context().get_node_id())

    def node_ip(self) -> str:
        """This machine's address in the cluster."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def total(self, resource: str) -> float:
        """How much of a resource the cluster has."""
        return float(ray.cluster_resources().get(resource, 0.0))  # type: ignore[no-untyped-call]

    def free(self, resource: str) -> float:
        """How much of a resource nobody uses."""
        return float(ray.available_resources().get(resource, 0.0))  # type: ignore[no-untyped-call]

    def error_log(self, pid: int) -> Path | None:
        """Where a process of the Ray we started writes its errors."""
        if self._logs is None:
            return None
        return next(iter(self._logs.glob(f"worker-*-{pid}.err")), None)

    def _start(self) -> None:
        for name, value in _LOCAL_ENV.items():
            os.environ.setdefault(name, value)
        # Ray's ports are open on every interface: without this token nobody can use them. Ray.init
        # turns token authentication on by itself (2.59 and later) unless RAY_AUTH_MODE says otherwise;
        # setting the mode here would come too late, Ray reads it when it is imported.
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        folder = self._temp_dir()
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=self._cpus,
            num_gpus=0 if self._cpu_only else None,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            **_quiet(),
        )
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            _LOG.warning("this Ray runs without token authentication: set RAY_AUTH_MODE=token")
        self._logs = folder / "session_latest" / "logs"

    def _temp_dir(self) -> Path:
        if self._config.temp_dir:
            return Path(self._config.temp_dir).resolve()
        base = tempfile.gettempdir()
        short = base if len(base) <= _MAX_TEMP_PATH - 16 else "/tmp"
        self._temp = Path(tempfile.mkdtemp(prefix="cw", dir=short))
        return self._temp / "ray"  # Ray opens its directory to all; the one around it is ours alone


def _check_reachable(address: str) -> None:
    """Refuse an address that nobody answers; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto", "local", "ray://...": Ray's own words
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cluster.ray.address = {address}: no Ray answers there ({error});"
            " start one with `ray start --head`, or leave the key empty"
        ) from error


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR}
