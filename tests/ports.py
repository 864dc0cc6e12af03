"""Ports for servers that a test starts later, or in another process."""

import itertools
import os
import random
import socket
from collections.abc import Iterator

# Below what systems give to outgoing connections, one of which could take a port before its server does.
FIRST, LAST = 20_000, 32_000
# Processes of `make test` draw from different ports.
NUM_SHARES = 16
SHARE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % NUM_SHARES


def _shuffled() -> Iterator[int]:
    """Yields every port of this process's share, again and again, in an order of its own."""
    ports = [port for port in range(FIRST, LAST) if port % NUM_SHARES == SHARE]
    random.SystemRandom().shuffle(ports)
    return itertools.cycle(ports)


_PORTS = _shuffled()


def free_port() -> int:
    """Returns a port of this machine that nobody listens on, other than those given before.

    Binding port 0 and closing the socket would give one that the next connection of any process may get.
    """
    for port in itertools.islice(_PORTS, LAST - FIRST):
        with socket.socket() as probe:
            # As servers do, or a port would look taken for a minute after its last connection.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {FIRST} to {LAST}")
