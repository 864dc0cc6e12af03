"""Own sockets between ranks that may have to part at once: greeting, messages, groups of a generation.

torch's gloo cannot give a collective up: `abort` and `shutdown` leave it waiting for a stopped peer until the
timeout (measured with torch 2.15), and a collective that was given up may still write into its buffers. Here
`Channel.abort` ends every wait within a millisecond, and only the thread that called a collective writes.

A connection begins with a greeting: both sides show, by HMAC-SHA256 over each other's fresh numbers, that
they know the key of the run (it lies in the run's folder); nothing is read from one that does not. Then
messages: a length, at most `MESSAGE_BYTES`, and JSON, or, in a `Channel`, a number and a length that must be
the expected ones, and raw bytes. Nothing is unpickled.

Invariant: a channel is used by one thread at a time; `abort` may be called from any.
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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from foldfeed.trainer.errors import WireError

NONCE_BYTES = 16
DIGEST_BYTES = 32
# A generation of 4,096 members takes about 700 KB.
MESSAGE_BYTES = 1 << 22
GREETING_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")
_HANGUP = getattr(select, "POLLRDHUP", 0)
# Of a part of a collective: its number in the channel, its bytes.
_HEADER = struct.Struct("<QQ")


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
    """What still goes one way over one connection in one collective."""

    def __init__(self, number: int, views: Sequence[memoryview], *, incoming: bool) -> None:
        self._expected = _HEADER.pack(number, sum(len(view) for view in views))
        self._header = bytearray(_HEADER.size) if incoming else bytearray(self._expected)
        self._left = [memoryview(self._header), *(view for view in views if len(view))]

    def _advance(self, num_bytes: int) -> bool:
        while self._left and num_bytes >= len(self._left[0]):
            num_bytes -= len(self._left.pop(0))
        if num_bytes:
            self._left[0] = self._left[0][num_bytes:]
        return not self._left

    def send(self, connection: socket.socket) -> bool:
        """Sends what fits; returns whether all is sent."""
        # 16 of them: below the least limit of an iovec.
        return self._advance(connection.sendmsg(self._left[:16]))

    def receive(self, connection: socket.socket) -> bool:
        """Receives what is there; returns whether all has come."""
        before = len(self._left[0])
        num_bytes = connection.recv_into(self._left[0])
        if not num_bytes:
            raise WireError("closed by the other side")
        done = self._advance(num_bytes)
        if num_bytes == before and self._header != self._expected:
            raise WireError(
                f"a message {_HEADER.unpack(self._header)} where {_HEADER.unpack(self._expected)} belongs"
            )
        return done


class Channel:
    """One connection to each other rank, for collectives one after another."""

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], timeout_s: float) -> None:
        """Takes the connections over.

        Args:
          rank: of this process.
          peers: connections by the rank at their other end.
          timeout_s: without a byte in either direction, after which a collective fails.
        """
        self.rank = rank
        self.world = len(peers) + 1
        self._peers = dict(peers)
        self.timeout_s = timeout_s
        self._number = 0
        self._aborted = ""
        self._parts: list[Channel] = []
        for connection in self._peers.values():
            connection.setblocking(False)

    @property
    def aborted(self) -> str:
        """Why nothing goes over it any more, or nothing."""
        return self._aborted

    def connection(self, peer: int) -> socket.socket:
        """Returns the connection to a rank; it does not block."""
        return self._peers[peer]

    def part(self, members: Sequence[int]) -> Channel:
        """Returns a channel of some ranks over the same connections, numbered as they are listed.

        No two ranks may talk over this one and a part, or over two parts, at the same time.
        """
        peers = {index: self._peers[rank] for index, rank in enumerate(members) if rank != self.rank}
        self._parts.append(Channel(list(members).index(self.rank), peers, self.timeout_s))
        return self._parts[-1]

    def exchange(
        self,
        sends: Mapping[int, Sequence[memoryview]],
        receives: Mapping[int, Sequence[memoryview]],
    ) -> None:
        """Sends to and receives from several ranks at once; all of them call it for the same collective.

        Args:
          sends: bytes for each rank.
          receives: where each rank's bytes go; exactly as many must come.
        Raises:
          WireError: a peer is gone, silent, out of step, or `abort` was called.
        """
        self._number += 1
        flows = {(peer, False): _Flow(self._number, views, incoming=False) for peer, views in sends.items()}
        flows.update({(p, True): _Flow(self._number, views, incoming=True) for p, views in receives.items()})
        deadline = time.monotonic() + self.timeout_s
        while True:
            if self._aborted:
                raise WireError(self._aborted)
            moved = [key for key in list(flows) if self._move(key, flows)]
            if not flows:
                return
            if moved:
                deadline = time.monotonic() + self.timeout_s
                continue
            if time.monotonic() > deadline:
                silent = sorted({peer for peer, _ in flows})
                raise WireError(f"ranks {silent} sent and took nothing for {self.timeout_s:g} s")
            self._wait(flows, deadline)

    def _move(self, key: tuple[int, bool], flows: dict[tuple[int, bool], _Flow]) -> bool:
        """Moves bytes of one flow; returns whether any moved."""
        peer, incoming = key
        connection = self._peers[peer]
        try:
            done = flows[key].receive(connection) if incoming else flows[key].send(connection)
        except BlockingIOError:
            return False
        except (OSError, WireError) as error:
            raise WireError(self._aborted or f"rank {peer}: {error}") from error
        if done:
            del flows[key]
        return True

    def _wait(self, flows: Mapping[tuple[int, bool], _Flow], deadline: float) -> None:
        poller = select.poll()
        idle = {}
        for peer, connection in self._peers.items():
            events = (select.POLLIN if (peer, True) in flows else 0) | (
                select.POLLOUT if (peer, False) in flows else 0
            )
            # Who is done with this collective may still give the generation up; Linux alone tells.
            poller.register(connection, events or _HANGUP)
            if not events:
                idle[connection.fileno()] = peer
        for number, _ in poller.poll(1e3 * max(0.0, deadline - time.monotonic())):
            if number in idle:
                raise WireError(self._aborted or f"rank {idle[number]}: closed by the other side")

    def abort(self, reason: str) -> None:
        """Ends what is under way here and, as their connections close, at the peers. From any thread."""
        for channel in (*self._parts, self):
            channel._aborted = channel._aborted or reason
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connections, once no thread uses them any more."""
        self._aborted = self._aborted or "closed"
        for connection in self._peers.values():
            connection.close()


def raw(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor, which they alias."""
    if not tensor.numel():
        return memoryview(b"")
    # As bytes first: numpy has no bfloat16.
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class MeshGroup:
    """The collectives of the trainer over a channel: `ranks.Group`.

    Tensors on a device take their way over the host, so several ranks may share one GPU.
    """

    def __init__(self, channel: Channel) -> None:
        """Starts the thread that all-gathers go on in."""
        self.channel = channel
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foldfeed-gather")
        self._parts: list[MeshGroup] = []

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Sends each rank its run of ``sent``; ``received`` gets the runs of all, in rank order."""
        target = received if received.device.type == "cpu" else torch.empty_like(received, device="cpu")
        ours = sent.cpu().split(sent_sizes)
        theirs = target.split(received_sizes)
        mine = self.channel.rank
        others = [rank for rank in range(self.channel.world) if rank != mine]
        self.channel.exchange(
            {rank: [raw(ours[rank])] for rank in others}, {rank: [raw(theirs[rank])] for rank in others}
        )
        theirs[mine].copy_(ours[mine])
        if target is not received:
            received.copy_(target)

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        """Starts to gather every rank's equally long tensor; returns what waits for it."""
        target = gathered if gathered.device.type == "cpu" else torch.empty_like(gathered, device="cpu")
        own = mine.cpu()
        rows = target.split(mine.numel())
        rank = self.channel.rank
        others = [other for other in range(self.channel.world) if other != rank]
        future = self._thread.submit(
            self.channel.exchange, {r: [raw(own)] for r in others}, {r: [raw(rows[r])] for r in others}
        )

        def wait() -> None:
            future.result()
            rows[rank].copy_(own)
            if target is not gathered:
                gathered.copy_(target)

        return wait

    def part(self, members: Sequence[int]) -> MeshGroup:
        """Returns a group of some ranks over the same connections, see `Channel.part`."""
        self._parts.append(MeshGroup(self.channel.part(members)))
        return self._parts[-1]

    def abort(self, reason: str) -> None:
        """Ends what is under way."""
        self.channel.abort(reason)

    def close(self) -> None:
        """Ends the threads and closes the connections."""
        self.channel.abort("closed")
        for group in (*self._parts, self):
            group._thread.shutdown(wait=True)
        self.channel.close()
