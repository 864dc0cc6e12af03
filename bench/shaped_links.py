"""Nodes with shaped links on one machine, and what those links give at best; for trainer_overlap.py."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BRIDGE, PREFIX = f"ffo{os.getpid()}", f"ffo{os.getpid()}-"
_counter = itertools.count(1)


def run(*arguments: str) -> None:
    """Runs a command of the system's network tools."""
    subprocess.run(arguments, check=True, capture_output=True, timeout=30)


@contextmanager
def namespaces(number: int, mbit: int) -> Iterator[list[str]]:
    """Makes so many namespaces with shaped links; removes them at the end."""
    # New names each time: the kernel takes links down in the background.
    names = [f"{PREFIX}{next(_counter)}" for _ in range(number)]
    try:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        for index, name in enumerate(names):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", f"v{name}", "master", BRIDGE, "up")
            run("ip", "-n", name, "addr", "add", f"10.77.9.{index + 1}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            shape = ["tbf", "rate", f"{mbit}mbit", "burst", "512kb", "latency", "200ms"]
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, timeout=30, check=False)


class Streams:
    """Plain connections between all ranks, a thread for each direction: what the links give at best."""

    def __init__(self, rank: int, world: int, meet: Callable[[], object]) -> None:
        addresses = [(f"10.77.9.{other + 1}", 29572) for other in range(world)]
        self._peers: dict[int, socket.socket] = {}
        with socket.create_server(addresses[rank]) as listener:
            meet()
            for other in range(rank):
                self._peers[other] = socket.create_connection(addresses[other])
                self._peers[other].sendall(bytes([rank]))
            while len(self._peers) < world - 1:
                connection, _ = listener.accept()
                self._peers[connection.recv(1)[0]] = connection

    def move(self, num_bytes: int) -> None:
        """Sends so many bytes in all, evenly to all, and receives as many."""
        each = num_bytes // len(self._peers)
        threads = []
        for connection in self._peers.values():
            sent, received = bytes(each), bytearray(each)
            threads.append(threading.Thread(target=connection.sendall, args=(sent,)))
            threads.append(
                threading.Thread(target=connection.recv_into, args=(received, each, socket.MSG_WAITALL))
            )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Closes them."""
        for connection in self._peers.values():
            connection.close()
