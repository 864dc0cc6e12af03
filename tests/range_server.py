"""A plain web server for a folder, with byte ranges or, like Python's own, without."""

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes; without this the second waits 40 ms for the first to be acknowledged.
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path))
        moved = self.path.removeprefix("/moved")
        if moved != self.path:
            return self._send(302, b"", {"Location": moved})
        file = self.server.folder / unquote(self.path).lstrip("/")
        if not file.is_file():
            return self._send(self.server.absent, b"not here")
        told = {}
        if self.server.tags:
            # As nginx makes them.
            told = {"ETag": f'"{file.stat().st_mtime_ns:x}-{file.stat().st_size:x}"'}
        data = file.read_bytes()
        if self.command == "HEAD":
            return self._send(200, data, told)
        time.sleep(self.server.pause_s)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.server.ranges:
            return self._send(200, data, told)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        told["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], told)

    do_HEAD = do_GET

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.server.sent.append(len(data))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def range_server(
    folder: Path,
    *,
    ranges: bool = True,
    absent: int = 404,
    tags: bool = False,
    pause_s: float = 0.0,
    sent: list[int] | None = None,
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields the URL of a folder and the (growing) list of requests.

    Args:
      folder: what is served.
      ranges: whether parts of a file can be asked for.
      absent: the status of files that are not there.
      tags: whether answers name the version of a file.
      pause_s: before every answer that has a body.
      sent: grows by the length of every body.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.ranges, server.requests = folder, ranges, []
    # Of files that are not there: 403 is what S3 says where listing is not allowed.
    server.absent, server.tags, server.pause_s = absent, tags, pause_s
    server.sent = sent if sent is not None else []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
