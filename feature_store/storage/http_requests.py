"""Files on a plain web server, read only.

Owns HTTP and HTTPS: connections that stay open, redirects, byte ranges, and the sizes that the answers name.
Not fsspec's HTTP file system, which takes any failure to ask for "there is no such file" and the whole file
for the range that was asked for when a server knows no ranges.

A web server cannot say which files there are, so whatever needs a list is refused, and all writing.

Thread and fork safety: each thread of each process has connections of its own.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foldfeed.feature_store.errors import StorageRefusedError, StoreUrlError
from foldfeed.feature_store.storage.contract import FileInfo, ForbiddenError
from foldfeed.feature_store.storage.fsspec_requests import Fetched
from foldfeed.feature_store.storage.options import HTTP_PROTOCOLS, without_secrets
from foldfeed.feature_store.storage.retries import ShortReadError, retry_policy

_MAX_REDIRECTS = 5
_OK, _PARTIAL, _RANGE_NOT_SATISFIABLE = 200, 206, 416
_REDIRECTS = (301, 302, 303, 307, 308)
_ABSENT = (404, 410)
_DENIED = (401, 407)
_FORBIDDEN = 403
_local = threading.local()


class _Connections:
    """A thread's open connections, by process and address; they are closed with the thread."""

    def __init__(self) -> None:
        self.open: dict[Any, http.client.HTTPConnection] = {}

    def __del__(self) -> None:
        for connection in self.open.values():
            connection.close()


class HttpFiles:
    """Files below one URL of a web server."""

    can_create_exclusively = False
    can_list = False

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname:
            raise StoreUrlError(url, "it names no host")
        if parts.query or parts.fragment:
            # The query of a signed URL is a secret.
            raise StoreUrlError(
                without_secrets(url), "a store is a folder, and ? or # cannot be in the URL of one"
            )
        self.identity = f"{parts.scheme}://{parts.netloc}"
        self._url = url.rstrip("/")

    def get(self, path: str, start: int, size: int | None) -> Fetched:
        # An open range also for the whole: its answer names the size of the file besides that of the body, so
        # a body that something on the way cut short, with a length to match, is found out.
        last = "" if size is None else start + size - 1
        answer, data = self._ask("GET", path, {"Range": f"bytes={start}-{last}"})
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status == _RANGE_NOT_SATISFIABLE:
            # Behind the end of the file.
            return Fetched(b"", int(total) if total.isdecimal() else self.head(path).num_bytes)
        if answer.status == _OK and size is None and start == 0:
            # A server that knows no ranges; the length of the body is all it says.
            return Fetched(data, _size_of(answer))
        if answer.status == _OK:
            raise StorageRefusedError(
                f"{self._url}/{path}",
                "read a part of",
                "the server answers a range with the whole file; serve the store from one that knows byte "
                "ranges (nginx, Apache and object stores do, python -m http.server does not)",
            )
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ShortReadError(
                f"asked from byte {start} on, the server sent {answer.headers.get('Content-Range')!r}"
            )
        return Fetched(data, int(total) if total.isdecimal() else None)

    def head(self, path: str) -> FileInfo:
        answer, _ = self._ask("HEAD", path, {})
        size = _size_of(answer)
        if size is None:
            raise OSError(f"the server does not say how large {self._url}/{path} is")
        when = answer.headers.get("Last-Modified")
        modified_s = email.utils.parsedate_to_datetime(when).timestamp() if when else 0.0
        return FileInfo(
            path=path, num_bytes=size, modified_s=modified_s, version=answer.headers.get("ETag", "")
        )

    def put(self, path: str, data: bytes) -> None:
        self._refuse("write", path)

    def create(self, path: str, data: bytes, token: str) -> None:
        self._refuse("write", path)

    def is_ours(self, path: str, data: bytes, token: str) -> bool:
        return False

    def upload(self, path: str, local: Path, retried: Callable[[Callable[[], Any]], Any]) -> None:
        self._refuse("write", path)

    def names(self, prefix: str) -> list[str]:
        self._refuse("list", prefix)

    def walk(self, prefix: str) -> list[FileInfo]:
        self._refuse("list", prefix)

    def remove(self, paths: Sequence[str]) -> None:
        self._refuse("delete from", "")

    def touch(self, path: str) -> None:
        self._refuse("write", path)

    def uploads(self) -> list[FileInfo]:
        self._refuse("list", "")

    def abort(self, path: str) -> None:
        self._refuse("delete from", "")

    def _refuse(self, operation: str, path: str) -> NoReturn:
        raise StorageRefusedError(
            f"{self._url}/{path}" if path else self._url,
            operation,
            "a web server only gives out files whose names are known. Records can be read, cropped and "
            "queried from here; for all else use the s3://, gs:// or local URL of the store",
        )

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        url = f"{self._url}/{urllib.parse.quote(path)}"
        for _ in range(_MAX_REDIRECTS + 1):
            answer, data = _request(method, url, headers)
            if answer.status not in _REDIRECTS:
                break
            url = urllib.parse.urljoin(url, answer.headers.get("Location", ""))
        if answer.status in _ABSENT:
            raise FileNotFoundError(url)
        if answer.status == _FORBIDDEN:
            raise ForbiddenError(f"the server answered {answer.status} {answer.reason}")
        if answer.status in _DENIED:
            raise PermissionError(f"the server answered {answer.status} {answer.reason}")
        if answer.status not in (_OK, _PARTIAL, _RANGE_NOT_SATISFIABLE):
            raise OSError(f"the server answered {answer.status} {answer.reason}")
        return answer, data


def _size_of(answer: http.client.HTTPResponse) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _request(method: str, url: str, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in HTTP_PROTOCOLS or not parts.hostname:
        raise OSError(f"the server sent us on to {url!r}, which is no web address")
    key = os.getpid(), parts.scheme, parts.netloc
    connections = _local.__dict__.setdefault("connections", _Connections()).open
    connection = connections.pop(key, None) or _connect(parts)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    try:
        # Without "identity" a server may compress, and then sizes and ranges are those of something else.
        connection.request(method, target, headers={"Accept-Encoding": "identity", **headers})
        answer = connection.getresponse()
        data = answer.read()
    except BaseException:
        # What is left of the answer must not be taken for the next one's.
        connection.close()
        raise
    connections[key] = connection
    return answer, data


def _connect(parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """Returns a connection, through the proxy that the environment names for it (HTTPS_PROXY, HTTP_PROXY)."""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    timeout_s = retry_policy().timeout_s
    assert parts.hostname is not None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname):
        return kind(parts.hostname, parts.port, timeout=timeout_s)
    between = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    assert between.hostname is not None, proxy
    connection = kind(between.hostname, between.port, timeout=timeout_s)
    connection.set_tunnel(parts.hostname, parts.port)
    return connection
