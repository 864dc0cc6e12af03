"""A proxy between a client and a web or S3 server that breaks answers, and requests, on purpose.

What happens to the n-th request is drawn from a seed; with `only` faults are held back to some requests.
"""

import contextlib
import http.client
import http.server
import random
import socket
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator

# What may happen to a request; those that say "after" happen when the server has done it.
BEFORE = ("error 500", "error 503", "cut before")
UPLOAD = ("cut upload",)
AFTER = ("error 500 after", "cut after", "slow")
BODY = ("cut in the body", "short, length right", "body too long")
# Half a body and then silence; costs a client the time that it waits, so not among `ALL`.
STALL = ("stalled",)
STALL_S = 3.0
SLOW_S = 0.03
ALL = (*BEFORE, *UPLOAD, *AFTER, *BODY)
_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultProxy(http.server.ThreadingHTTPServer):
    """Counts what it did in ``done``."""

    daemon_threads = True
    # Not the default 5: clients open many connections at once.
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        parts = urllib.parse.urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.calm()

    def inject(
        self,
        rate: float,
        seed: int = 0,
        kinds: tuple[str, ...] = ALL,
        only: Callable[[str, str], bool] = lambda method, path: True,
    ) -> None:
        """From now on breaks that share of the requests for which ``only(method, path)`` is true."""
        with self._lock:
            self._rate, self._kinds, self._only = rate, kinds, only
            self._random = random.Random(seed)

    def calm(self) -> None:
        """From now on breaks nothing."""
        self.inject(0.0)

    def draw(self, method: str, path: str, has_body: bool) -> str:
        with self._lock:
            self.done["requests"] += 1
            if self._random.random() >= self._rate or not self._only(method, path):
                return ""
            kinds = self._kinds if has_body else [kind for kind in self._kinds if kind not in UPLOAD]
            kind = self._random.choice(kinds or [""])
            self.done[kind] += 1
            return kind

    def handle_error(self, request, client_address) -> None:
        """A client that was cut off may cut us off in turn."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes; without this the second waits 40 ms for the first to be acknowledged.
    disable_nagle_algorithm = True
    server: FaultProxy
    timeout = 60

    def log_message(self, *args) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.draw(self.command, self.path, bool(body))
        if kind == "cut upload":
            self._forward_half(body)
            return self._hang_up()
        if kind == "cut before":
            return self._hang_up()
        if kind in ("error 500", "error 503"):
            return self._error(int(kind[-3:]))
        status, reason, headers, data = self._forward(body)
        if kind == "cut after":
            return self._hang_up()
        if kind == "error 500 after":
            return self._error(500)
        if kind == "slow":
            time.sleep(SLOW_S)
        self._answer(status, reason, headers, data, kind)
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in (*_HOP, "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, answer.reason, answer.getheaders(), data

    def _forward_half(self, body: bytes) -> None:
        """The server gets the head and half of the body, and then nothing more."""
        lines = [f"{self.command} {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "expect"]
        with socket.create_connection(self.server.upstream, timeout=60) as upstream:
            upstream.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, kind: str
    ) -> None:
        half = data[: len(data) // 2]
        length = len(data)
        if kind == "short, length right":
            length, data = len(half), half
        elif kind == "body too long":
            data = data + b"#" * 100
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in (*_HOP, "content-length") or (
                name.lower() == "content-length" and self.command == "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            data = b""
        self.wfile.write(half if kind in ("cut in the body", "stalled") else data)
        if kind == "stalled":
            self.wfile.flush()
            time.sleep(STALL_S)
        if kind in (*BODY, *STALL):
            self._hang_up()

    def _error(self, status: int) -> None:
        code = {500: "InternalError", 503: "SlowDown"}[status]
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        if self.command == "HEAD":
            body = b""
        self.send_response_only(status, "injected")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Yields a running proxy that breaks nothing yet."""
    proxy = FaultProxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(10)
