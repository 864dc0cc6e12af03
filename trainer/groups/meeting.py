"""How ranks that share a store connect their own sockets (wire.py): each listens, each pair greets.

Whoever is not of the run may connect to the listeners, too: one that says nothing, or nonsense, is left to
itself and closed, and holds nobody up. A greeting costs at most `GREETING_BYTES` of memory, and its time is
limited as a whole.

Owns: where a rank listens, who is let in (`Greeter`, for elastic runs too: members/peers.py), and the
connections until all are there. Does not own: what goes over them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed import Store

from foldfeed.trainer.errors import WireError
from foldfeed.trainer.groups.wire import MeshGroup, dial, greet

# A host and how it is written down.
Address = tuple[socket.AddressFamily, str]
# Of one who connected: a rank needs milliseconds. Others may take so long, this many at a time.
GREETING_S = 10.0
GREETED_AT_ONCE = 256
# After which a process that can accept nobody tries it again.
ACCEPT_AGAIN_S = 0.2


def meet(store: Store, rank: int, world: int, timeout_s: float) -> MeshGroup:
    """Connects the ranks of a run that share a store. A collective.

    Args:
      store: where they leave addresses, and the first one the key of their greetings.
      rank: this process.
      world: number of processes.
      timeout_s: without another rank that connects, and of collectives as in `MeshGroup`.
    Raises:
      WireError: a rank cannot be reached.
    """
    if rank == 0:
        store.set("foldfeed/mesh/key", secrets.token_hex(32))
    peers: dict[int, socket.socket] = {}
    came: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
    with _listener(world) as listener, contextlib.ExitStack() as unless_all_came:
        store.set(f"foldfeed/mesh/{rank}", json.dumps(listener.getsockname()[:2]))
        key = bytes.fromhex(store.get("foldfeed/mesh/key").decode())
        greeting_s = min(GREETING_S, timeout_s)
        with contextlib.closing(
            Greeter(listener, key, greeting_s, {"rank": int}, lambda other, rank: came.put((rank, other)))
        ):
            for other in range(rank):
                there, port = json.loads(store.get(f"foldfeed/mesh/{other}"))
                try:
                    peers[other] = dial((there, port), key, {"rank": rank}, timeout_s)
                except WireError as error:
                    raise WireError(
                        f"rank {other}: {error}; GLOO_SOCKET_IFNAME says by which interface"
                    ) from error
                unless_all_came.callback(peers[other].close)
            deadline = time.monotonic() + timeout_s
            while missing := sorted(set(range(rank + 1, world)) - set(peers)):
                try:
                    other, connection = came.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty as error:
                    raise WireError(f"ranks {missing} did not connect within {timeout_s:g} s") from error
                unless_all_came.callback(connection.close)
                if other not in missing:
                    raise WireError(f"rank {other} connected, where {missing} should")
                peers[other] = connection
                deadline = time.monotonic() + timeout_s
        unless_all_came.pop_all()
    return MeshGroup(rank, peers, timeout_s)


class Greeter:
    """Accepts whoever connects to a listener, and greets each in a thread of its own."""

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        timeout_s: float,
        fields: Mapping[str, Callable[[Any], Any]],
        greeted: Callable[..., None],
    ) -> None:
        """Begins to accept.

        Args:
          listener: listening; owned from here on.
          key: that members of this run know.
          timeout_s: for all of a greeting.
          fields: what a greeting must say, and what makes a value of it (or raises TypeError or ValueError).
          greeted: called from threads with a connection, which it owns then, and the fields by name.
        """
        self._listener = listener
        self._key = key
        self._timeout_s = timeout_s
        self._fields = fields
        self._greeted = greeted
        self._free = threading.Semaphore(GREETED_AT_ONCE)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="foldfeed-accept", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            self._free.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # The end; or no descriptor is left, until others close theirs.
                self._free.release()
                self._over.wait(ACCEPT_AGAIN_S)
                continue
            threading.Thread(
                target=self._greet, args=(connection,), name="foldfeed-greet", daemon=True
            ).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            hello = greet(connection, self._key, self._timeout_s)
            said = {name: kind(hello[name]) for name, kind in self._fields.items()}
        except (WireError, KeyError, TypeError, ValueError):
            connection.close()  # a stranger, or somebody who was cut off while greeting: they learn by this
        else:
            if self._over.is_set():
                connection.close()
            else:
                self._greeted(connection, **said)
        finally:
            self._free.release()

    def close(self) -> None:
        """Accepts nobody any more; a greeting that is under way may still be told."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._free.release()
        self._thread.join()
        self._listener.close()


def _listener(world: int) -> socket.socket:
    """Returns a listener at an address of this machine that the other ranks can use."""
    *better, last = _own_addresses(world)
    for family, host in better:
        # The host's name may stand for an address that it has no more.
        with contextlib.suppress(OSError):
            return socket.create_server((host, 0), family=family, backlog=world)
    return socket.create_server((last[1], 0), family=last[0], backlog=world)


def _own_addresses(world: int) -> list[Address]:
    """Returns addresses of this machine for the other ranks, the best first.

    That of the interface given to gloo, or the one on the way to the first rank's machine. On that machine
    itself the way may be loopback, which is no use to ranks on others: then, as gloo takes it, what the
    host's name stands for.
    """
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip():
        return [_of_interface(name)]
    way = _on_the_way()
    found = []
    if _is_loopback(way[1]) and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < world:
        with contextlib.suppress(socket.gaierror):
            named = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
            found = [(family, str(address[0])) for family, _, _, _, address in named]
    return [*(one for one in found if not _is_loopback(one[1])), way]


def _is_loopback(host: str) -> bool:
    return host.startswith(("127.", "::ffff:127.")) or host == "::1"


def _of_interface(name: str) -> Address:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            # SIOCGIFADDR, see netdevice(7): an ifreq, whose name is followed by a sockaddr_in.
            answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", name.encode()))
        except OSError as error:
            # A line is address, index, length of the prefix, scope (0: global), flags, name.
            table = Path("/proc/net/if_inet6")
            lines = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
            for address, _, _, scope, _, interface in lines:
                if interface == name and int(scope, 16) == 0:
                    return socket.AF_INET6, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
            raise WireError(f"GLOO_SOCKET_IFNAME={name}: no address ({error})") from error
    return socket.AF_INET, socket.inet_ntoa(answer[20:24])


def _on_the_way() -> Address:
    first, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    found = socket.getaddrinfo(first, port, type=socket.SOCK_DGRAM)
    for family, _, _, _, address in found:
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            try:
                asking.connect(address)
            except OSError as error:
                # A name may stand for addresses of a kind that this machine has no way to.
                failure = error
                continue
            return family, str(asking.getsockname()[0])
    raise WireError(f"no way to MASTER_ADDR={first} ({failure})")
