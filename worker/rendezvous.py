"""The store over which ranks find each other, served by rank 0 on one address only.

``init_process_group("tcp://...")`` would let rank 0 listen on every interface and needs a port that
is known to be free beforehand. Here rank 0 binds port 0 of one address, hands the listening socket to
the store, and tells the port; afterwards every rank, rank 0 too, joins as a client.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]


def serve_store(host: str, timeout_s: float) -> tuple[TCPStore, str]:
    """Serve a store on ``host`` (an address of this machine) at a port the system chooses.

    Returns the store, which must be kept as long as the world lives, and ``tcp://host:port``.

    Raises:
        OSError: the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(1024)
        port = int(listener.getsockname()[1])
    except OSError:
        listener.close()
        raise
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store owns the socket from here on
    )
    return store, f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def join_as_client() -> None:
    """Make ``init_process_group(init_method="tcp://...")`` in this process connect, never serve.

    torch's own switch for "somebody else serves the store" is this pair of environment variables.
    """
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
