"""Ranged reads of S3's objects, signed here and sent over our own connections.

The general client (s3fs, aiobotocore) takes 4.2 ms of CPU for a read of 20 kB, this 0.4 (on one machine, in
one run), and a sample is three or four such reads. Endpoint, region and credentials are still that client's:
it is asked once how it would reach the bucket, and for its credentials every `_CREDENTIALS_S`. Whatever this
module does not know (a proxy, a bucket that is no plain name, a redirect to another region) it leaves to that
client.

Owns signatures (AWS Signature Version 4) and what an answer that is no data means, which is what the general
client would have said. Does not own connections (`storage.http_wire`) nor retries. Thread and fork safe: what
was found out is kept by process.

Source: AWS, Signature Version 4 signing process; Amazon S3 API, GetObject.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import hmac
import html
import importlib
import os
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import fsspec.asyn

import foldfeed.feature_store.storage.http_wire as http_wire
from foldfeed.feature_store.storage.fsspec_requests import Fetched, file_system
from foldfeed.feature_store.storage.options import S3_VARIABLES
from foldfeed.feature_store.storage.retries import ShortReadError, retry_policy

_OK, _PARTIAL = 200, 206
# Another region, or another place: the general client knows how to find it, and is asked from then on.
_ELSEWHERE = (301, 302, 307, 308, 400)
# Keys that have ended, though not for long: the general client is asked this time, and for new ones.
_ENDED_KEYS = ("ExpiredToken", "TokenRefreshRequired")
# A request that came too slowly.
_TOO_SLOW = "RequestTimeout"
_LENGTHS = {"content-length", "transfer-encoding"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# Clients get new credentials ten minutes before the old ones end.
_CREDENTIALS_S = 60.0
# Names of S3 for which other rules hold (access points by ARN, directory buckets, Outposts, Object Lambda).
_PLAIN_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SPECIAL_BUCKETS = ("--x-s3", "--op-s3", "--ol-s3")
# The only ones made here: version 4.
_SIGNATURES = "s3v4"
_GLOBAL_HOST = "s3.amazonaws.com"
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True, slots=True)
class _Keys:
    access: str
    # Not in a traceback that shows variables.
    secret: str = dataclasses.field(repr=False)
    token: str = dataclasses.field(repr=False)

    def are_plain(self) -> bool:
        """Returns whether they can stand in a header as they are: lines of files have ends."""
        return not re.search(r"[^!-~]", self.access + self.token)


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """How a bucket is reached.

    Attributes:
      address: of the server.
      host: as the header names it.
      path: before an object's key.
      region: signatures are for.
      is_signed: False where everybody may read.
    """

    address: http_wire.Address
    host: str
    path: str
    region: str
    is_signed: bool


class S3Reads:
    """Reads of objects of one bucket."""

    def __init__(self, url: str, bucket: str) -> None:
        self._url = url
        self._bucket = bucket
        # By process and environment; None for the general client.
        self._ways: dict[tuple[object, ...], _Way | None] = {}
        self._keys: dict[tuple[object, ...], tuple[float, _Keys]] = {}

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return S3Reads, (self._url, self._bucket)

    def get(self, key: str, start: int, size: int | None) -> Fetched | None:
        """Returns bytes of an object, None when the general client is to be asked.

        Args:
          key: of the object.
          start: first byte.
          size: how many, None for all.
        Raises:
          OSError: what the general client would have raised.
          http.client.HTTPException: what came is no whole answer.
        """
        where = (os.getpid(), *map(os.environ.get, S3_VARIABLES))
        if where not in self._ways:
            # Several threads may; all find the same.
            self._ways[where] = self._find_way()
        way = self._ways[where]
        if way is None:
            return None
        last = "" if size is None else start + size - 1
        headers = {"host": way.host, "range": f"bytes={start}-{last}"}
        target = f"{way.path}/{urllib.parse.quote(key, safe='/~')}"
        if way.is_signed:
            keys = self._keys_of(where)
            if not keys.are_plain():
                return None
            headers = signed(target, headers, keys, way.region, _now())
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        # Without "identity" a server may compress, and then ranges are those of something else.
        request = "\r\n".join([*lines, "accept-encoding: identity", "", ""]).encode()
        answer = http_wire.get(way.address, request, retry_policy().timeout_s)
        if answer.status in (_OK, _PARTIAL):
            if answer.status == _OK and not answer.headers.keys() & _LENGTHS:
                raise ShortReadError(f"nobody says whether the {len(answer.body)} bytes that came are all")
            return fetched(answer.body, start, size, answer.status, answer.headers.get("content-range", ""))
        code = _code_of(answer)[0]
        if code in _ENDED_KEYS:
            self._keys.pop(where, None)
            return None
        if answer.status in _ELSEWHERE and code != _TOO_SLOW:
            self._ways[where] = None
            return None
        raise _error_of(answer)

    def _find_way(self) -> _Way | None:
        if not _PLAIN_BUCKET.fullmatch(self._bucket) or self._bucket.endswith(_SPECIAL_BUCKETS):
            return None
        files = file_system(self._url)[0]
        found: _Way | None = fsspec.asyn.sync(files.loop, self._ask_way, files)
        return found

    async def _ask_way(self, files: Any) -> _Way | None:
        client = await files.set_session()
        if not files.anon and client.meta.config.signature_version != _SIGNATURES:
            return None
        # Which no two settings resolve differently: region, addressing style, dual stack and the like.
        parts = urllib.parse.urlsplit(
            await client.generate_presigned_url("get_object", Params={"Bucket": self._bucket, "Key": "k"})
        )
        if parts.scheme not in _PORTS or not parts.hostname or not parts.path.endswith("/k"):
            return None
        proxies = urllib.request.getproxies()
        if proxies.get(parts.scheme) and not urllib.request.proxy_bypass(parts.hostname):
            return None
        bundle = None
        if parts.scheme == "https":
            bundle = files.session.get_config_variable("ca_bundle")
            bundle = bundle or importlib.import_module("botocore.httpsession").where()
        region = client.meta.region_name or ""
        # As clients name it: without a user, and without the port that goes without saying.
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        if parts.port not in (None, _PORTS[parts.scheme]):
            host = f"{host}:{parts.port}"
        regional = urllib.parse.urlsplit(client.meta.endpoint_url).netloc
        if host.endswith(_GLOBAL_HOST) and regional.endswith(".amazonaws.com"):
            # URLs are made for the host of all regions, requests go to that of the bucket's.
            host = host.removesuffix(_GLOBAL_HOST) + regional
        at = urllib.parse.urlsplit(f"//{host}")
        assert at.hostname is not None, host
        return _Way(
            http_wire.Address(at.hostname, at.port or _PORTS[parts.scheme], bundle),
            host,
            parts.path.removesuffix("/k"),
            "us-east-1" if region in ("", "aws-global") else region,
            not files.anon,
        )

    def _keys_of(self, where: tuple[object, ...]) -> _Keys:
        until, keys = self._keys.get(where, (0.0, None))
        if keys is None or until < time.monotonic():
            files = file_system(self._url)[0]
            keys = fsspec.asyn.sync(files.loop, _ask_keys, files)
            self._keys[where] = time.monotonic() + _CREDENTIALS_S, keys
        return keys


def fetched(data: bytes, start: int, size: int | None, status: int, content_range: str) -> Fetched:
    """Returns what came as an answer to a range, checked for being that range.

    Args:
      data: the body.
      start: first byte asked for.
      size: how many were, None for all.
      status: 200 or 206.
      content_range: as the answer says, "" where it does not.
    Raises:
      ShortReadError: they are other bytes.
    """
    if status == _OK:
        # The whole object: a server may answer so when that is what was asked for.
        if start or (size is not None and len(data) > size):
            last = "" if size is None else start + size - 1
            raise ShortReadError(
                f"asked for bytes {start}-{last}, the server sent all {len(data)} of the file"
            )
        return Fetched(data, None)
    found = _CONTENT_RANGE.fullmatch(content_range)
    if found is None or int(found[1]) != start:
        raise ShortReadError(f"asked from byte {start} on, the server sent {content_range!r}")
    if int(found[2]) - start + 1 != len(data):
        raise ShortReadError(f"{len(data)} bytes came of a file of {found[3]}, called {content_range!r}")
    return Fetched(data, int(found[3]) if found[3] != "*" else None)


async def _ask_keys(files: Any) -> _Keys:
    await files.set_session()
    if files.key:
        return _Keys(files.key, files.secret, files.token or "")
    found = await files.session.get_credentials()
    if found is None:
        raise importlib.import_module("botocore.exceptions").NoCredentialsError
    frozen = await found.get_frozen_credentials()
    return _Keys(frozen.access_key, frozen.secret_key, frozen.token or "")


def signed(
    target: str, headers: dict[str, str], keys: _Keys, region: str, now: datetime.datetime
) -> dict[str, str]:
    """Returns the headers of a GET with those that sign it (AWS Signature Version 4, service s3).

    Args:
      target: quoted path, no query.
      headers: by name in lower case, host among them; all of them are signed.
      keys: of whoever asks.
      region: of the bucket.
      now: in UTC.
    """
    moment = f"{now:%Y%m%dT%H%M%SZ}"
    headers = headers | {"x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": moment}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    names = sorted(headers)
    joined = ";".join(names)
    lines = ["GET", target, "", *(f"{name}:{headers[name]}" for name in names), "", joined, _EMPTY_SHA256]
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
    signature = hmac.digest(_signing_key(keys.secret, moment[:8], region), text.encode(), "sha256").hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.access}/{scope}, SignedHeaders={joined}, Signature={signature}"
    )
    return headers


@functools.lru_cache(maxsize=8)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _error_of(answer: http_wire.Answer) -> Exception:
    """Returns the error that the general client makes of an answer."""
    code, message = _code_of(answer)
    about = {
        "Error": {
            "Code": code or str(answer.status),
            "Message": message or f"the server answered {answer.status}",
        },
        "ResponseMetadata": {"HTTPStatusCode": answer.status},
    }
    error: Exception = importlib.import_module("botocore.exceptions").ClientError(about, "GetObject")
    translate: Callable[[Exception], Exception] = importlib.import_module("s3fs.errors").translate_boto_error
    return translate(error)


def _code_of(answer: http_wire.Answer) -> tuple[str, str]:
    """Returns S3's word for an error and its message, "" for what is not there."""
    text = answer.body.decode(errors="replace")
    found = (re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message"))
    code, message = (html.unescape(one[1]) if one else "" for one in found)
    return code, message
