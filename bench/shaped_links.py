"""Nodes with shaped links on one machine, and what those links give at best; for trainer_overlap.py."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from foldfeed.trainer.network import namespaces


@contextmanager
def shaped(number: int, mbit: int) -> Iterator[list[tuple[list[str], str]]]:
    """Makes so many namespaces with shaped links; yields what runs a command in each, and its address."""
    shape = ["tbf", "rate", f"{mbit}mbit", "burst", "512kb", "latency", "200ms"]
    with namespaces(number) as network:
        places = [network.place(slot) for slot in range(number)]
        for enter, _ in places:
            tc = [*enter, "tc", "qdisc", "add", "dev", "eth0", "root", *shape]
            subprocess.run(tc, check=True, capture_output=True, timeout=30)
        yield places


class Streams:
    """Plain connections between all ranks, a thread for each direction: what the links give at best."""

    def __init__(self, rank: int, world: int, meet: Callable[[], object]) -> None:
        subnet = os.environ["MASTER_ADDR"].rpartition(".")[0]
        addresses = [(f"{subnet}.{other + 1}", 29572) for other in range(world)]
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
