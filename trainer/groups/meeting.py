"""How ranks that share a store connect their own sockets (wire.py): each listens, each pair greets.

Whoever is not of the run may connect to the listeners, too: one that says nothing, or nonsense, is left to
itself and closed, and holds nobody up. A greeting costs at most `GREETING_BYTES` of memory, and its time is
limited as a whole.

Owns: where a rank listens, and the connections until all are there. Does not own: what goes over them.
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
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import Store

from foldfeed.trainer.errors import WireError
from foldfeed.trainer.groups.wire import MeshGroup, dial, greet

# A host and how it is written down.
Address = tuple[socket.AddressFamily, str]
# Of one who connected: a rank needs milliseconds. Others may take so long, this many at a time.
GREETING_S = 10.0
GREETED_AT_ONCE = 256


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
    with contextlib.ExitStack() as unless_all_came:
        with _listening(world) as listener:
            store.set(f"foldfeed/mesh/{rank}", json.dumps(listener.getsockname()[:2]))
            key = bytes.fromhex(store.get("foldfeed/mesh/key").decode())
            with _greeting(listener, key, timeout_s) as greeted:
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
                        other, connection = greeted.get(timeout=max(0.0, deadline - time.monotonic()))
                    except queue.Empty as error:
                        raise WireError(f"ranks {missing} did not connect within {timeout_s:g} s") from error
                    unless_all_came.callback(connection.close)
                    if other not in missing:
                        raise WireError(f"rank {other} connected, where {missing} should")
                    peers[other] = connection
                    deadline = time.monotonic() + timeout_s
        unless_all_came.pop_all()
    return MeshGroup(rank, peers, timeout_s)


@contextlib.contextmanager
def _greeting(
    listener: socket.socket, key: bytes, timeout_s: float
) -> Iterator[queue.SimpleQueue[tuple[int, socket.socket]]]:
    """Yields where ranks that connect arrive, with their numbers. Nobody is greeted any more afterwards."""
    found: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
    free = threading.Semaphore(GREETED_AT_ONCE)
    over = threading.Event()

    def greets(connection: socket.socket) -> None:
        try:
            rank = int(greet(connection, key, min(GREETING_S, timeout_s))["rank"])
        except (WireError, KeyError, TypeError, ValueError):
            connection.close()  # a stranger, or a rank that was cut off while greeting: it learns by this
        else:
            if over.is_set():
                connection.close()
            else:
                found.put((rank, connection))
        finally:
            free.release()

    def accepts() -> None:
        while not over.is_set():
            free.acquire()
            try:
                connection, _ = listener.accept()
            except OSError:
                # The end; or no descriptor is left, until strangers are gone.
                free.release()
                over.wait(0.1)
                continue
            threading.Thread(target=greets, args=(connection,), name="foldfeed-greet", daemon=True).start()

    thread = threading.Thread(target=accepts, name="foldfeed-meet", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        free.release()
        thread.join()


@contextlib.contextmanager
def _listening(world: int) -> Iterator[socket.socket]:
    """Yields a listener at an address of this machine that the other ranks can use."""
    *better, last = _own_addresses(world)
    for family, host in better:
        try:
            listener = socket.create_server((host, 0), family=family, backlog=world)
        except OSError:
            continue  # the host's name stands for an address that it has no more
        break
    else:
        listener = socket.create_server((last[1], 0), family=last[0], backlog=world)
    with listener:
        yield listener


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
