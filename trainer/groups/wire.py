"""Own sockets between ranks that may have to part at once: greeting, messages, groups of a generation.

torch's gloo cannot give a collective up: `abort` and `shutdown` leave it waiting for a stopped peer until the
timeout (measured with torch 2.15), and a collective that was given up may still write into its buffers. Here
`MeshGroup.abort` ends every wait within a millisecond, and only the thread that called a collective writes.

A connection begins with a greeting: both sides show, by HMAC-SHA256 over each other's fresh numbers, that
they know the key of the run (it lies in the run's folder); nothing is read from one that does not. Then
messages: a length, at most `MESSAGE_BYTES`, and JSON, or, in a `MeshGroup`, number and length that must be
the expected ones, and raw bytes. Nothing is unpickled.

Invariant: a group is used by one thread at a time; `abort` may be called from any.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foldfeed.trainer.errors import WireError

NONCE_BYTES = 16
DIGEST_BYTES = 32
# A generation of 4,096 members takes about 700 KB.
MESSAGE_BYTES = 1 << 22
GREETING_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")
HANGUP = getattr(select, "POLLRDHUP", 0)
# Of a part of a collective (its number in the group) or a message of gradients (stream.py): number, bytes.
HEADER = struct.Struct("<QQ")


def frame(message: Mapping[str, Any]) -> bytes:
    """Returns a message with its length."""
    raw = json.dumps(message).encode()
    assert len(raw) <= MESSAGE_BYTES, f"a message of {len(raw)} bytes"
    return _LENGTH.pack(len(raw)) + raw


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self, limit: int = MESSAGE_BYTES) -> None:
        self._limit = limit
        self._raw = bytearray()

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """Returns the messages that are whole now.

        Raises:
          WireError: one is too long, or no JSON object.
        """
        self._raw += raw
        found = []
        while len(self._raw) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._raw)
            if length > self._limit:
                raise WireError(f"a message of {length} bytes; at most {self._limit} are read")
            stop = _LENGTH.size + length
            if len(self._raw) < stop:
                break
            found.append(_parsed(bytes(self._raw[_LENGTH.size : stop])))
            del self._raw[:stop]
        return found


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except ValueError as error:
        raise WireError(f"a message that is no JSON ({error})") from error
    if not isinstance(message, dict):
        raise WireError(f"a message that is no JSON object but {type(message).__name__}")
    return message


def dial(address: tuple[str, int], key: bytes, hello: Mapping[str, Any], timeout_s: float) -> socket.socket:
    """Connects to a member and says what for; returns a blocking socket.

    Raises:
      WireError: nobody answers there, or not in time, or somebody who does not know the key.
    """
    try:
        connection = socket.create_connection(address, timeout_s)
    except OSError as error:
        raise WireError(f"no connection to {address[0]}:{address[1]} ({error})") from error
    deadline = time.monotonic() + timeout_s
    try:
        theirs, mine = _exactly(connection, NONCE_BYTES, deadline), secrets.token_bytes(NONCE_BYTES)
        body = frame(hello)
        connection.sendall(mine + hmac.digest(key, theirs + mine + body, "sha256") + body)
        expected = hmac.digest(key, mine + theirs, "sha256")
        if not hmac.compare_digest(_exactly(connection, DIGEST_BYTES, deadline), expected):
            raise WireError(f"{address[0]}:{address[1]} is not of this run: it does not know its key")
    except (OSError, WireError) as error:
        connection.close()
        raise WireError(f"no greeting from {address[0]}:{address[1]} ({error})") from error
    return _ready(connection)


def greet(connection: socket.socket, key: bytes, timeout_s: float) -> dict[str, Any]:
    """Checks who connected, and returns what for; the socket is blocking afterwards.

    Args:
      connection: as it was accepted.
      key: that members of this run know.
      timeout_s: for all of the greeting, however few bytes come at a time.
    Raises:
      WireError: not in time, or somebody who does not know the key.
    """
    deadline = time.monotonic() + timeout_s
    connection.settimeout(timeout_s)
    try:
        mine = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(mine)
        theirs = _exactly(connection, NONCE_BYTES, deadline)
        digest = _exactly(connection, DIGEST_BYTES, deadline)
        (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
        if length > GREETING_BYTES:
            raise WireError(f"a greeting of {length} bytes")
        raw = _exactly(connection, length, deadline)
        body = _LENGTH.pack(length) + raw
        if not hmac.compare_digest(digest, hmac.digest(key, mine + theirs + body, "sha256")):
            raise WireError("a greeting by somebody who does not know the key of the run")
        connection.sendall(hmac.digest(key, theirs + mine, "sha256"))
    except OSError as error:
        raise WireError(f"no greeting ({error})") from error
    _ready(connection)
    return _parsed(raw)


def _exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    raw = bytearray()
    while len(raw) < num_bytes:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left_s)
        part = connection.recv(num_bytes - len(raw))
        if not part:
            raise WireError("closed by the other side")
        raw += part
    return bytes(raw)


def _ready(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class _Flow:
    """What still goes one way between this process and a rank in one collective; nothing here waits.

    Attributes:
      peer: that rank.
      incoming: which way.
      left: what was not moved yet.
    """

    def __init__(self, peer: int, number: int, view: memoryview, *, incoming: bool) -> None:
        self.peer = peer
        self.incoming = incoming
        self._expected = HEADER.pack(number, len(view))
        self._header = bytearray(HEADER.size) if incoming else bytearray(self._expected)
        self.left = [memoryview(self._header), view]

    def send(self, connection: socket.socket) -> None:
        """Sends what fits."""
        advance(self.left, connection.sendmsg(self.left))

    def receive(self, connection: socket.socket) -> None:
        """Receives what is there."""
        is_header = len(self.left) == 2
        num_bytes = connection.recv_into(self.left[0])
        if not num_bytes:
            raise WireError("closed by the other side")
        advance(self.left, num_bytes)
        if is_header and len(self.left) < 2 and self._header != self._expected:
            raise WireError(
                f"a message {HEADER.unpack(self._header)} where {HEADER.unpack(self._expected)} belongs"
            )


def advance(views: list[memoryview], num_bytes: int) -> None:
    """Drops so many bytes in place."""
    while views and num_bytes >= len(views[0]):
        num_bytes -= len(views.pop(0))
    if num_bytes:
        views[0] = views[0][num_bytes:]


def raw(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor, which they alias."""
    # As bytes first: numpy has no bfloat16.
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class MeshGroup:
    """One connection to each other rank, for collectives one after another: a `ranks.Group`.

    Tensors on a device take their way over the host, so several ranks may share one GPU.

    Attributes:
      rank: of this process.
      world: how many ranks there are.
      timeout_s: without a byte in either direction, after which a collective fails.
      aborted: why nothing goes over it any more; empty before.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], timeout_s: float) -> None:
        """Takes the connections over.

        Args:
          rank: of this process.
          peers: connections by the rank at their other end.
          timeout_s: see the attributes.
        """
        self.rank = rank
        self.world = len(peers) + 1
        self.timeout_s = timeout_s
        self.aborted = ""
        self._peers = dict(peers)
        self._number = 0
        self._parts: list[MeshGroup] = []
        for connection in self._peers.values():
            connection.setblocking(False)

    def connection(self, peer: int) -> socket.socket:
        """Returns the connection to a rank; it does not block."""
        return self._peers[peer]

    def part(self, members: Sequence[int]) -> MeshGroup:
        """Returns a group of some ranks over the same connections, numbered as they are listed.

        No two ranks may talk over this one and a part, or over two parts, at the same time.
        """
        peers = {index: self._peers[rank] for index, rank in enumerate(members) if rank != self.rank}
        self._parts.append(MeshGroup(list(members).index(self.rank), peers, self.timeout_s))
        return self._parts[-1]

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Sends each rank its run of ``sent``; ``received`` gets the runs of all, in rank order."""
        self._swap(received, received_sizes, sent.cpu().split(sent_sizes))

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        """Gathers every rank's equally long tensor; what it returns has nothing to wait for."""
        self._swap(gathered, [mine.numel()] * self.world, [mine.cpu()] * self.world)
        return lambda: None

    def _swap(self, received: torch.Tensor, sizes: list[int], sent: Sequence[torch.Tensor]) -> None:
        """Sends a tensor to each rank; ``received`` gets those of all, in rank order."""
        target = received if received.device.type == "cpu" else torch.empty_like(received, device="cpu")
        rows = target.split(sizes)
        self.exchange(
            {peer: raw(sent[peer]) for peer in self._peers}, {peer: raw(rows[peer]) for peer in self._peers}
        )
        rows[self.rank].copy_(sent[self.rank])
        if target is not received:
            received.copy_(target)

    def exchange(self, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview]) -> None:
        """Sends to and receives from several ranks at once; all of them call it for the same collective.

        Args:
          sends: bytes for each rank.
          receives: where each rank's bytes go; exactly as many must come.
        Raises:
          WireError: a peer is gone, silent, out of step, or `abort` was called.
        """
        self._number += 1
        flows = [_Flow(peer, self._number, view, incoming=False) for peer, view in sends.items()]
        flows += [_Flow(peer, self._number, view, incoming=True) for peer, view in receives.items()]
        deadline = time.monotonic() + self.timeout_s
        while True:
            if self.aborted:
                raise WireError(self.aborted)
            moved = [flow for flow in flows if self._moves(flow)]
            flows = [flow for flow in flows if flow.left]
            if not flows:
                return
            if moved:
                deadline = time.monotonic() + self.timeout_s
                continue
            if time.monotonic() > deadline:
                silent = sorted({flow.peer for flow in flows})
                raise WireError(f"ranks {silent} sent and took nothing for {self.timeout_s:g} s")
            self._wait(flows, deadline)

    def _moves(self, flow: _Flow) -> bool:
        """Moves bytes of one flow; returns whether any moved."""
        try:
            (flow.receive if flow.incoming else flow.send)(self._peers[flow.peer])
        except BlockingIOError:
            return False
        except (OSError, WireError) as error:
            raise WireError(self.aborted or f"rank {flow.peer}: {error}") from error
        return True

    def _wait(self, flows: Sequence[_Flow], deadline: float) -> None:
        events = dict.fromkeys(self._peers, 0)
        for flow in flows:
            events[flow.peer] |= select.POLLIN if flow.incoming else select.POLLOUT
        poller = select.poll()
        for peer, connection in self._peers.items():
            # Who is done with this collective may still give the generation up; Linux alone tells.
            poller.register(connection, events[peer] or HANGUP)
        ready = {number for number, _ in poller.poll(1e3 * max(0.0, deadline - time.monotonic()))}
        for peer, connection in self._peers.items():
            if not events[peer] and connection.fileno() in ready:
                raise WireError(self.aborted or f"rank {peer}: closed by the other side")

    def abort(self, reason: str) -> None:
        """Ends what is under way here and, as their connections close, at the peers. From any thread."""
        for group in (*self._parts, self):
            group.aborted = group.aborted or reason
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends what is under way and closes the connections."""
        self.abort("closed")
        for connection in self._peers.values():
            connection.close()
