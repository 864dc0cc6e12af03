"""Reads of S3's objects on our own connections: signatures, and answers as servers may send them."""

import datetime
import hashlib
import http.client
import os
import socket
import threading

import numpy as np
import pytest
from s3_server import client_environment

from foldfeed.feature_store.storage import http_wire, open_blobs, s3_reads

REQUEST = b"GET /x HTTP/1.1\r\nhost: here\r\n\r\n"


def test_a_signature_is_that_of_the_manual():
    """Source: Amazon S3 API, Signature Calculations for the Authorization Header, example "GET Object"."""
    keys = s3_reads._Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "")
    found = s3_reads.signed(
        "/test.txt",
        {"host": "examplebucket.s3.amazonaws.com", "range": "bytes=0-9"},
        keys,
        "us-east-1",
        datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC),
    )
    assert found["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )
    with_token = s3_reads.signed(
        "/", {"host": "h"}, s3_reads._Keys("a", "s", "t"), "r", datetime.datetime.now(datetime.UTC)
    )
    assert with_token["x-amz-security-token"] == "t"
    assert "x-amz-date;x-amz-security-token" in with_token["authorization"]


class Server:
    """Sends what it is told to, piece by piece, one script a request, and counts its connections."""

    def __init__(self, *scripts: list[bytes], ends: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = http_wire.Address("127.0.0.1", self._listener.getsockname()[1], None)
        self.num_connections = 0
        self._scripts = iter(scripts)
        self._ends = ends
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            with connection:
                while connection.recv(65536):
                    for piece in next(self._scripts, []):
                        connection.sendall(piece)
                    if self._ends:
                        break

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        http_wire._idle.close()
        self._thread.join(10)

    def get(self) -> http_wire.Answer:
        return http_wire.get(self.address, REQUEST, 5.0)


def test_bodies_come_whole_however_they_are_cut():
    data = np.random.default_rng(1).bytes(200_000)
    head = b"HTTP/1.1 206 Partial\r\nX-Y: 1\r\nContent-Length: %d\r\n\r\n" % len(data)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\nA\r\n0123456789\r\n0\r\n"
    scripts = (
        [head + data],
        [head[:9], head[9:] + data[:5], data[5:]],
        [chunked + b"trailer: x\r\n\r\n"],
        [bytes([one]) for one in chunked + b"\r\n"],
        [b"HTTP/1.1 204 None\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"],
    )
    with Server(*scripts) as server:
        found = [server.get() for _ in scripts]
        assert server.num_connections == 1
    assert [answer.body for answer in found] == [data, data, b"abc0123456789", b"abc0123456789", b"", b""]
    assert (found[0].status, found[0].headers["x-y"]) == (206, "1")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_is_behind_an_answer_is_never_taken_for_the_next(answer):
    """The server closes, or may close, or sent more than it said: the next request gets a new connection."""
    with Server([answer], [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz"]) as server:
        assert [server.get().body, server.get().body] == [b"abc", b"xyz"]
        assert server.num_connections == 2


def test_a_body_without_a_length_ends_with_the_connection():
    with Server([b"HTTP/1.1 200 OK\r\n\r\nab", b"c"], ends=True) as server:
        assert server.get().body == b"abc"


def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again():
    answer = [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"]
    with Server(answer, answer, answer, ends=True) as server:
        for _ in range(3):
            assert server.get().body == b"abc"
            # Until the end of the connection is here.
            (waiting,) = http_wire._idle._by_address[server.address]
            waiting._socket.settimeout(5)
            assert waiting._socket.recv(1, socket.MSG_PEEK) == b""
        assert server.num_connections == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\nContent-", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", http.client.IncompleteRead),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc", http.client.IncompleteRead),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", http.client.IncompleteRead),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", http.client.HTTPException),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc", http.client.HTTPException),
        (b"SSH-2.0-x\r\n\r\n", http.client.BadStatusLine),
        (b"HTTP/1.1 100 Continue\r\n\r\n", http.client.BadStatusLine),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, http.client.LineTooLong),
    ],
)
def test_half_an_answer_is_an_error(answer, error):
    with Server([answer], ends=True) as server, pytest.raises(error):
        server.get()


def test_silence_ends_with_an_error():
    with Server([b"HTTP/1.1 200 OK\r\n"]) as server, pytest.raises(TimeoutError):
        http_wire.get(server.address, REQUEST, 0.2)


def test_keys_of_all_kinds_are_read_without_the_general_client(s3, monkeypatch):
    """Also a name that has to be quoted; and what is wrong is what the general client says is wrong."""
    names = ["a b", "a+b", "ä=1/x", "c%20d", "e~_.-!()'*", "f&g;h,i@j$k"]
    blobs = open_blobs(s3)
    for name in names:
        blobs.write_atomic(name, name.encode())
    asked = []
    general = type(blobs._files)._fetch
    monkeypatch.setattr(
        type(blobs._files), "_fetch", lambda self, *a, **k: asked.append(k) or general(self, *a, **k)
    )
    assert [blobs.read(name) for name in names] == [name.encode() for name in names]
    assert [blobs.read_range(name, 1, 2) for name in names] == [name.encode()[1:3] for name in names]
    with pytest.raises(FileNotFoundError):
        blobs.read("none")
    assert asked == []
    # The long way brings the same bytes.
    monkeypatch.setattr(s3_reads.S3Reads, "get", lambda *_: None)
    assert [blobs.read(name) for name in names] == [name.encode() for name in names]
    assert len(asked) == len(names)


def test_where_the_way_is_not_plain_the_general_client_goes(s3, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert s3_reads.S3Reads(s3, "bucket").get("x", 0, 1) is None
    assert s3_reads.S3Reads(s3, "arn:aws:s3:us-west-2:1:accesspoint").get("x", 0, 1) is None
    assert s3_reads.S3Reads(s3, "bucket--usw2-az1--x-s3").get("x", 0, 1) is None
    assert s3_reads.S3Reads(s3, "alias--op-s3").get("x", 0, 1) is None


def test_another_kind_of_signature_is_left_to_the_general_client(monkeypatch, tmp_path):
    (tmp_path / "config").write_text("[default]\ns3 =\n  signature_version = s3\n")
    endpoint = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_CONFIG_FILE": str(tmp_path / "config")}
    for name, value in (client_environment("") | endpoint).items():
        monkeypatch.setenv(name, value)
    assert s3_reads.S3Reads("s3://bucket/x", "bucket").get("x", 0, 1) is None


def test_keys_come_from_wherever_the_general_client_takes_them(s3, tmp_path, monkeypatch):
    """A profile in a file, here."""
    blobs = open_blobs(s3)
    blobs.write_atomic("x", b"0123456789")
    (tmp_path / "keys").write_text(
        f"[other]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(type(blobs._files), "_fetch", None)
    assert open_blobs(s3).read_range("x", 3, 4) == b"3456"
    assert hashlib.sha256(open_blobs(s3).read("x")).digest() == hashlib.sha256(b"0123456789").digest()


@pytest.mark.parametrize(
    ("settings", "host", "path", "is_signed"),
    [
        ({"ENDPOINT_URL": "https://[::1]:9000"}, "[::1]:9000", "/bucket", True),
        ({"ENDPOINT_URL": "http://minio.example"}, "minio.example", "/bucket", True),
        ({"ENDPOINT_URL": "https://me:mine@gate.example:443/s3"}, "gate.example", "/s3/bucket", True),
        ({"ENDPOINT_URL": "http://gate.example:443/"}, "gate.example:443", "/bucket", True),
        ({"REGION": "eu-west-1"}, "bucket.s3.eu-west-1.amazonaws.com", "", True),
        ({"SKIP_SIGNATURE": "true", "ENDPOINT_URL": "http://h:1"}, "h:1", "/bucket", False),
    ],
)
def test_the_way_to_a_bucket_is_the_general_clients(monkeypatch, settings, host, path, is_signed):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    given = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"} | settings
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    found = s3_reads.S3Reads("s3://bucket/x", "bucket")._find_way()
    assert found is not None
    assert (found.host, found.path, found.is_signed) == (host, path, is_signed)
    assert found.region == given["REGION"]
    assert (found.address.ca_bundle is not None) == (not settings.get("ENDPOINT_URL", "").startswith("http:"))


def test_a_bucket_that_is_elsewhere_is_left_to_the_general_client(s3, monkeypatch):
    """It knows how to follow; and from then on no request is wasted on the short way."""
    blobs = open_blobs(s3)
    blobs.write_atomic("x", b"0123456789")
    asked = []
    moved = http_wire.Answer(307, {}, b"")
    monkeypatch.setattr(http_wire, "get", lambda *_: asked.append(1) or moved)
    assert [blobs.read("x") for _ in range(3)] == [b"0123456789"] * 3
    assert len(asked) == 1


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch):
    """What stands between may have forgotten it without a word."""
    answer = [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"]
    with Server(answer, answer, answer) as server:
        assert server.get().body == server.get().body == b"abc"
        assert server.num_connections == 1
        monkeypatch.setattr(http_wire, "_MAX_IDLE_S", -1.0)
        # The server takes one connection after the other, so the second proves that the first was closed.
        assert server.get().body == b"abc"
        assert server.num_connections == 2


def test_a_body_in_a_coding_that_nobody_asked_for_is_an_error():
    with (
        Server(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
        ) as server,
        pytest.raises(http.client.HTTPException, match="gzip, chunked"),
    ):
        server.get()
