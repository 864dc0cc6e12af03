"""How ranks connect their own sockets: strangers at the door, ranks that do not come, addresses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, Store

from foldfeed.trainer.errors import WireError
from foldfeed.trainer.groups import meeting
from foldfeed.trainer.groups.meeting import meet
from foldfeed.trainer.groups.wire import MeshGroup, dial, greet
from foldfeed.trainer.members.peers import CONTROL, Peer, Peers

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def connected(store: Store, rank: int) -> socket.socket:
    """A stranger's connection to a rank."""
    host, port = json.loads(store.get(f"foldfeed/mesh/{rank}"))
    return socket.create_connection((host, port))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def sums(groups: list[MeshGroup]) -> list[float]:
    def work(rank: int) -> float:
        gathered = torch.zeros(len(groups))
        groups[rank].all_gather(gathered, torch.tensor([float(rank)]))()
        return float(gathered.sum())

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, range(len(groups))))


def test_strangers_at_the_door_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say nothing, too little, nonsense, or go; more of them than are greeted at a time."""
    monkeypatch.setattr(meeting, "GREETED_AT_ONCE", 4)
    monkeypatch.setattr(meeting, "GREETING_S", 1.0)
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, store, 0, 3, 30.0)
        strangers = [connected(store, 0) for _ in range(9)]
        strangers[0].sendall(bytes(5))
        strangers[1].sendall(bytes(16 + 32) + struct.pack("<I", 1 << 31))
        strangers[2].sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
        strangers[3].close()
        began = time.monotonic()
        others = [pool.submit(meet, store, rank, 3, 30.0) for rank in (1, 2)]
        groups = [one.result() for one in (first, *others)]
        assert time.monotonic() - began < 10
    assert sums(groups) == [3.0] * 3
    for one in (*groups, *strangers):
        one.close()


def test_a_greeting_has_one_time_for_all_of_it() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as caller,
        ThreadPoolExecutor(1) as pool,
    ):
        connection, _ = listener.accept()
        answer = pool.submit(greet, connection, b"k" * 32, 0.5)
        began = time.monotonic()
        while not answer.done() and time.monotonic() - began < 5:
            caller.sendall(b"x")
            time.sleep(0.1)
        with pytest.raises(WireError, match=r"no greeting .*timed out"):
            answer.result(0)
        connection.close()


def test_a_rank_that_does_not_come_is_named_and_nothing_stays_open() -> None:
    before = descriptors()
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(meet, store, rank, 4, 1.0) for rank in (0, 1, 2)]
        began = time.monotonic()
        while not all(one.done() for one in found):
            # Strangers are no news of it. The first one may give up before the others.
            with contextlib.suppress(ConnectionRefusedError):
                connected(store, 0).close()
            time.sleep(0.05)
            assert time.monotonic() - began < 20
        for one in found:
            with pytest.raises(WireError, match=r"ranks \[3\] did not connect within 1 s"):
                one.result()
    while descriptors() > before:
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    assert not [one for one in threading.enumerate() if one.name == "foldfeed-accept"]


def test_a_rank_that_cannot_be_reached_is_named() -> None:
    store = HashStore()
    store.set("foldfeed/mesh/key", "00" * 32)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        store.set("foldfeed/mesh/0", json.dumps(gone.getsockname()))
    with pytest.raises(WireError, match=r"rank 0: no connection to 127\.0\.0\.1.*GLOO_SOCKET_IFNAME says"):
        meet(store, 1, 2, 1.0)


def test_a_rank_that_comes_twice_is_an_error() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, store, 0, 3, 10.0)
        host, port = json.loads(store.get("foldfeed/mesh/0"))
        key = bytes.fromhex(store.get("foldfeed/mesh/key").decode())
        for _ in range(2):
            dial((host, port), key, {"rank": 2}, 5.0).close()
        with pytest.raises(WireError, match=r"rank 2 connected, where \[1\] should"):
            first.result()


def named(host: str | None) -> Callable[..., object]:
    """What stands in for `socket.getaddrinfo`, where this host's name has that address."""
    real = socket.getaddrinfo

    def found(name: str, *arguments: object, **options: object) -> object:
        if name != "this-host":
            return real(name, *arguments, **options)  # type: ignore[arg-type]
        if host is None:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))]

    return found


@pytest.mark.parametrize(
    ("named_as", "local", "listens"),
    [
        # Another machine cannot dial loopback, so the host's name is asked, as gloo does.
        ("192.0.2.7", "2", "192.0.2.7"),
        ("192.0.2.7", "4", "127.0.0.1"),
        ("127.0.1.1", "2", "127.0.0.1"),
        (None, "2", "127.0.0.1"),
    ],
)
def test_the_first_machine_is_not_known_as_loopback_to_others(
    monkeypatch: pytest.MonkeyPatch, named_as: str | None, local: str, listens: str
) -> None:
    """Launchers of several machines name the first one ``localhost`` to itself (Kubeflow's PyTorchJob)."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(socket, "gethostname", lambda: "this-host")
    monkeypatch.setattr(socket, "getaddrinfo", named(named_as))
    assert meeting._own_addresses(4)[0][1] == listens
    # TEST-NET-1 is nobody's: a name that leads nowhere is no reason not to listen.
    with meeting._listener(4) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_way_is_looked_for_to_each_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have addresses of a kind that this machine has no way to."""
    monkeypatch.setenv("MASTER_ADDR", "first")
    nowhere = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("255.255.255.255", 1))
    here = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 1))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [nowhere, here])
    assert meeting._on_the_way() == (socket.AF_INET, "127.0.0.1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [nowhere])
    with pytest.raises(WireError, match="no way to MASTER_ADDR=first"):
        meeting._on_the_way()


def test_the_interface_that_gloo_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of several, as gloo takes them; one without IPv4 has IPv6."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    assert meeting._own_addresses(2) == [(socket.AF_INET, "127.0.0.1")]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "only6")
    ends = ("fe800000000000000000000000000001 02 40 20 80", "20010db8000000000000000000000005 02 40 00 80")
    table = "".join(f"{end} only6\n" for end in ends)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: table)
    assert meeting._own_addresses(2) == [(socket.AF_INET6, "2001:db8::5")]


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ranks_meet_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no address ::1")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: meet(store, rank, 2, 20.0), range(2)))
    assert sums(groups) == [1.0] * 2
    for group in groups:
        group.close()


class Nobody:
    """An owner of peers that only waits for them."""

    def understand(self, peer: Peer, message: object) -> None:
        raise AssertionError(message)

    def lost(self, peer: Peer, why: str) -> None:
        pass


def test_a_member_without_descriptors_lets_others_in_once_it_has_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scarce(socket.socket):
        refusals = 3

        def accept(self) -> tuple[socket.socket, object]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr(meeting, "ACCEPT_AGAIN_S", 0.01)
    listener = Scarce()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    members = Peers("a", listener, b"k" * 32, 5.0, Nobody())
    hello = {"uid": "b", "purpose": CONTROL, "generation": 0}
    connection = dial(listener.getsockname(), b"k" * 32, hello, 5.0)
    with members.lock:
        assert members.lock.wait_for(lambda: "b" in members.known, 10)
    members.close()
    connection.close()
