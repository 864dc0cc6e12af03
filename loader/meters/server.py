"""`MetricsServer`: a small HTTP server on this machine's loopback that Prometheus can scrape.

One thread listens and answers; the text is made when it is asked for. Only ``/metrics`` is answered, and only
to this machine: whoever wants it elsewhere forwards the port. Closing it ends the thread and frees the port.
"""

from __future__ import annotations

import http.server
import socketserver
import sys
import threading
from collections.abc import Callable
from typing import Any

from foldfeed.loader.errors import LoaderConfigError
from foldfeed.loader.meters.reports import CONTENT_TYPE

HOST = "127.0.0.1"
PATH = "/metrics"
# A client that connects and says nothing holds the one thread up no longer than this.
CLIENT_TIMEOUT_S = 5.0


class MetricsServer:
    """Answers until it is closed.

    Attributes:
      port: that it listens on.
    """

    def __init__(self, text: Callable[[], str], port: int) -> None:
        """Starts to listen.

        Args:
          text: returns what is answered, in Prometheus' text format; called on the server's thread.
          port: 1 to 65535, or 0 for one that is free.
        Raises:
          LoaderConfigError: no such port, or one that is taken.
        """
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
            raise LoaderConfigError("port", port, "must be an integer in 0..65535, 0 for a free one")
        try:
            self._server = _Server((HOST, port), _handler(text))
        except OSError as error:
            raise LoaderConfigError(
                "port",
                port,
                f"cannot be listened on at {HOST} ({error}); choose another, or 0 for a free one",
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="foldfeed-metrics",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and frees the port. Idempotent."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Server(socketserver.TCPServer):
    """Not `http.server.HTTPServer`, which asks a name server for this machine's name when it starts."""

    # A run that is started again takes the port of the one before.
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is its own business; anything else is shown as usual.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _handler(text: Callable[[], str]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = CLIENT_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != PATH:
                self.send_error(404, f"only {PATH} is here")
                return
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: a scrape every few seconds would fill the run's output."""

    return Handler
