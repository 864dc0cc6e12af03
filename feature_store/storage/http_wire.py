"""GET requests over connections that stay open, with little work for the interpreter.

A sample is three or four reads of some ten kilobytes, so what a request costs in this process decides how
many samples a core can read: a general client spends milliseconds there, this one a few tenths of one. It
knows what a ranged read needs and no more: one request at a time on a connection, bodies by length, in chunks
or to the end, no redirects, no compression, no proxies (`storage.s3_reads` leaves those to the general one).

Invariants: a body is whole or an error is raised; a connection is used again only when its last answer was
read to its end and nothing came behind it, so no byte of one answer is ever taken for another's.

Thread and fork safe: a connection is in use by one thread; a forked child leaves those of its parent alone.
"""

from __future__ import annotations

import atexit
import collections
import functools
import http.client
import os
import select
import socket
import ssl
import threading
import time
from typing import NamedTuple

from foldfeed.feature_store.storage.options import CONNECT_TIMEOUT_S, MAX_CONNECTIONS

# A head comes with the beginning of its body; larger pieces would only be copied.
_PIECE_BYTES = 64 << 10
_MAX_HEAD_BYTES = 64 << 10
# Servers end idle connections after some seconds and say so; what stands between (address translation,
# balancers) forgets them after minutes and does not, and then a request waits for all the silence allowed.
_MAX_IDLE_S = 15.0
# Of a body whose length nobody says: an error's text.
_MAX_OPEN_BODY_BYTES = 16 << 20
_NO_BODY = (204, 304)
_END_OF_HEAD = b"\r\n\r\n"


class Address(NamedTuple):
    """Where a server is.

    Attributes:
      host: its name.
      port: of TCP.
      ca_bundle: file of the certificates to trust; None for no TLS.
    """

    host: str
    port: int
    ca_bundle: str | None


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
      status: of HTTP.
      headers: by name in lower case.
      body: whole.
    """

    status: int
    headers: dict[str, str]
    body: bytes


class _Connection:
    def __init__(self, address: Address, timeout_s: float) -> None:
        connected = socket.create_connection((address.host, address.port), timeout=CONNECT_TIMEOUT_S)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.ca_bundle is not None:
                connected = _tls(address.ca_bundle).wrap_socket(connected, server_hostname=address.host)
            connected.settimeout(timeout_s)
        except BaseException:
            connected.close()
            raise
        self._socket = connected
        self._left = b""
        self._arrived = select.poll()
        self._arrived.register(connected, select.POLLIN)
        self._used_s = time.monotonic()

    def is_usable(self) -> bool:
        """Returns whether the last answer is not long ago, and nothing came since, not even the end."""
        if self._left or time.monotonic() - self._used_s > _MAX_IDLE_S:
            return False
        # Of a piece that TLS has decrypted as a whole the socket knows nothing.
        is_read = not isinstance(self._socket, ssl.SSLSocket) or not self._socket.pending()
        return is_read and not self._arrived.poll(0)

    def close(self) -> None:
        self._socket.close()

    def ask(self, request: bytes, timeout_s: float) -> tuple[Answer, bool]:
        """Returns the answer, and whether the connection can be used again."""
        if self._socket.gettimeout() != timeout_s:
            self._socket.settimeout(timeout_s)
        self._socket.sendall(request)
        lines = self._head().split("\r\n")
        version, _, rest = lines[0].partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not status.isdecimal() or int(status) < 200:
            raise http.client.BadStatusLine(lines[0])
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        is_kept = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if int(status) in _NO_BODY:
            body = b""
        elif coding is not None:
            if coding.lower() != "chunked":
                raise http.client.HTTPException(f"the server sends a body as {coding!r}, not asked for")
            body = self._chunks()
        elif length is not None:
            if not length.isdecimal():
                raise http.client.HTTPException(f"the server names a length of {length!r}")
            body = self._take(int(length))
        else:
            is_kept = False
            body = self._rest()
        self._used_s = time.monotonic()
        return Answer(int(status), headers, body), is_kept

    def _head(self) -> str:
        head = self._left
        while (end := head.find(_END_OF_HEAD)) < 0:
            if len(head) > _MAX_HEAD_BYTES:
                raise http.client.LineTooLong("header")
            piece = self._socket.recv(_PIECE_BYTES)
            if not piece:
                raise ConnectionResetError("the server ended the connection without an answer")
            head = head + piece if head else piece
        self._left = head[end + len(_END_OF_HEAD) :]
        return head[:end].decode("latin-1")

    def _take(self, size: int) -> bytes:
        found, self._left = self._left[:size], self._left[size:]
        if len(found) == size:
            return found
        pieces, missing = [found], size - len(found)
        while missing:
            piece = self._socket.recv(missing)
            if not piece:
                raise http.client.IncompleteRead(b"".join(pieces), missing)
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _line(self) -> bytes:
        while (end := self._left.find(b"\r\n")) < 0:
            piece = self._socket.recv(_PIECE_BYTES)
            if not piece or len(self._left) > _MAX_HEAD_BYTES:
                raise http.client.IncompleteRead(self._left)
            self._left += piece
        line, self._left = self._left[:end], self._left[end + 2 :]
        return line

    def _chunks(self) -> bytes:
        pieces = []
        while True:
            text = self._line().partition(b";")[0].strip()
            try:
                size = int(text, 16)
            except ValueError as error:
                raise http.client.HTTPException(f"the server begins a chunk with {text!r}") from error
            if size == 0:
                break
            pieces.append(self._take(size))
            self._take(2)
        # Trailers, and the empty line behind them.
        while self._line():
            pass
        return b"".join(pieces)

    def _rest(self) -> bytes:
        pieces = [self._left]
        self._left = b""
        num_bytes = len(pieces[0])
        while piece := self._socket.recv(_PIECE_BYTES):
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > _MAX_OPEN_BODY_BYTES:
                raise http.client.HTTPException(f"more than {_MAX_OPEN_BODY_BYTES} bytes without a length")
        return b"".join(pieces)


class _Idle:
    """Open connections that nobody uses, the one used last first; of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_address: dict[Address, collections.deque[_Connection]] = {}

    def take(self, address: Address) -> _Connection | None:
        while True:
            with self._lock:
                waiting = self._by_address.get(address)
                if not waiting:
                    return None
                connection = waiting.pop()
            if connection.is_usable():
                return connection
            connection.close()

    def put(self, address: Address, connection: _Connection) -> None:
        with self._lock:
            waiting = self._by_address.setdefault(address, collections.deque())
            waiting.append(connection)
            surplus = waiting.popleft() if len(waiting) > MAX_CONNECTIONS else None
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        for waiting in list(self._by_address.values()):
            while waiting:
                waiting.pop().close()


_idle = _Idle()


def _forget_connections() -> None:
    global _idle
    # They are the parent's: this closes the child's descriptors and sends nothing.
    _idle.close()
    _idle = _Idle()


os.register_at_fork(after_in_child=_forget_connections)
atexit.register(lambda: _idle.close())


def get(address: Address, request: bytes, timeout_s: float) -> Answer:
    """Returns the answer to one request that changes nothing.

    Args:
      address: of the server.
      request: head of a GET, its empty line included.
      timeout_s: longest silence of the server.
    Raises:
      OSError: the network failed.
      http.client.HTTPException: what came is no whole answer.
    """
    connection = _idle.take(address) or _Connection(address, timeout_s)
    try:
        answer, is_kept = connection.ask(request, timeout_s)
    except BaseException:
        # What is left of the answer must not be taken for the next one's.
        connection.close()
        raise
    if is_kept:
        _idle.put(address, connection)
    else:
        connection.close()
    return answer


@functools.cache
def _tls(ca_bundle: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_bundle)
    except OSError as error:
        # As it is, "no such file" would be taken for the server's answer.
        raise ssl.SSLCertVerificationError(
            f"certificates to trust cannot be read from {ca_bundle!r} ({error}); AWS_CA_BUNDLE or ca_bundle "
            "of a profile names a file in PEM format"
        ) from error
