"""A plain web server for a folder, with byte ranges or, like Python's own, without."""

import contextlib
import http.server
import re
import threading
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
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.server.ranges:
            return self._send(200, data)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self._send(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    do_HEAD = do_GET

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def range_server(
    folder: Path, *, ranges: bool = True, absent: int = 404
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields the URL of a folder and the (growing) list of requests."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.ranges, server.requests = folder, ranges, []
    # Of files that are not there: 403 is what S3 says where listing is not allowed.
    server.absent = absent
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
