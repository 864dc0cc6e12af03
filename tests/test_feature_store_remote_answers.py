"""Answers to reads of S3's objects: over TLS, other bytes than were asked for, and what is no data."""

import contextlib
import datetime
import socket
import ssl
import sys
import threading

import pytest
from s3_server import FOREIGN_VARIABLES, client_environment

from foldfeed.feature_store.errors import StorageError
from foldfeed.feature_store.storage import http_wire, open_blobs, s3_reads

REQUEST = b"GET /x HTTP/1.1\r\nhost: here\r\n\r\n"


def certificate(folder):
    """Returns the path of a certificate for localhost with its key, and that of the certificate alone."""
    asymmetric = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = asymmetric.generate_private_key(asymmetric.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "both").write_bytes(secret + made)
    (folder / "certificate").write_bytes(made)
    return folder / "both", folder / "certificate"


@pytest.fixture
def encrypted(tmp_path):
    """Yields a server of TLS: it answers each request with what `answer` returns for it."""
    both, trusted = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    with EncryptedServer(context, trusted) as server:
        yield server
        http_wire._idle.close()


class EncryptedServer:
    def __init__(self, context: ssl.SSLContext, trusted) -> None:
        self._listener = socket.create_server(("localhost", 0))
        self._context = context
        self.port = self._listener.getsockname()[1]
        self.trusted = str(trusted)
        self.address = http_wire.Address("localhost", self.port, self.trusted)
        self.num_connections = 0
        self.requests: list[bytes] = []
        self.answer = lambda request: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._speak, args=(connection,), daemon=True).start()

    def _speak(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            spoken = self._context.wrap_socket(connection, server_side=True)
            with spoken:
                while request := spoken.recv(65536):
                    self.requests.append(request)
                    spoken.sendall(self.answer(request))

    def __enter__(self) -> "EncryptedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def test_what_tls_has_decrypted_behind_an_answer_is_never_taken_for_the_next(encrypted):
    """The end of a long body and what is behind it came in one piece, of which the socket shows nothing."""
    data = bytes(200_000)
    answers = iter(
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data + b"HTTP/1.1 404 No\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nend",
        ]
    )
    encrypted.answer = lambda request: next(answers)
    found = [http_wire.get(encrypted.address, REQUEST, 5.0) for _ in range(3)]
    assert [(one.status, one.body) for one in found] == [(200, data), (200, b"xyz"), (200, b"end")]
    assert encrypted.num_connections == 2


def test_who_answers_must_have_a_certificate_that_is_trusted(encrypted):
    for address in (
        # Of this server, under another name; and of somebody else.
        http_wire.Address("127.0.0.1", encrypted.port, encrypted.trusted),
        http_wire.Address("localhost", encrypted.port, ssl.get_default_verify_paths().cafile or ""),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            http_wire.get(address, REQUEST, 5.0)
    assert encrypted.requests == []


@pytest.fixture
def encrypted_s3(encrypted, monkeypatch):
    """Yields a bucket at that server, whose requests are made at most twice."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", *FOREIGN_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in client_environment(f"https://localhost:{encrypted.port}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CA_BUNDLE", encrypted.trusted)
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    monkeypatch.setenv("FOLDFEED_STORAGE_PAUSE_S", "0")
    return open_blobs("s3://bucket/x")


@pytest.mark.parametrize("where", ["none", "."])
def test_certificates_that_are_not_there_are_no_answer_about_a_file(
    encrypted_s3, tmp_path, monkeypatch, where
):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / where))
    with pytest.raises(StorageError, match=r"cannot be read.*AWS_CA_BUNDLE") as caught:
        encrypted_s3.read("y")
    assert caught.value.attempts == 1


@pytest.mark.parametrize(
    ("head", "body", "read", "expected"),
    [
        ("206 P\r\nContent-Range: bytes 2-4/9", b"cde", (2, 3), b"cde"),
        ("206 P\r\nContent-Range: bytes 2-4/*", b"cde", (2, 3), b"cde"),
        ("200 OK", b"abc", (0, 3), b"abc"),
        ("200 OK", b"abc", None, b"abc"),
        ("206 P\r\nContent-Range: bytes 0-2/3", b"abc", None, b"abc"),
        # Other bytes than were asked for, as many.
        ("206 P\r\nContent-Range: bytes 0-2/9", b"abc", (2, 3), None),
        ("206 P\r\nContent-Range: lines 2-4/9", b"cde", (2, 3), None),
        ("206 P", b"cde", (2, 3), None),
        ("206 P\r\nContent-Range: bytes 2-5/9", b"cde", (2, 3), None),
        ("200 OK", b"abc", (2, 3), None),
        ("200 OK", b"abcdef", (0, 3), None),
        # All of the beginning of a file.
        ("206 P\r\nContent-Range: bytes 0-2/9", b"abc", None, None),
        ("206 P\r\nContent-Range: bytes 0-8/*", b"abc", None, None),
    ],
)
@pytest.mark.parametrize("is_own", [True, False])
def test_only_the_bytes_that_were_asked_for_are_taken(
    encrypted, encrypted_s3, monkeypatch, is_own, head, body, read, expected
):
    """On our own connections and on those of the general client."""
    if not is_own:
        monkeypatch.setattr(s3_reads.S3Reads, "get", lambda *_: None)
    encrypted.answer = lambda request: (
        f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + (b"" if request.startswith(b"HEAD") else body)
    )
    ask = (lambda: encrypted_s3.read("y")) if read is None else lambda: encrypted_s3.read_range("y", *read)
    if expected is not None:
        assert ask() == expected
        return
    with pytest.raises(StorageError, match="ShortReadError"):
        ask()
    assert sum(request.startswith(b"GET") for request in encrypted.requests) == 2


def test_a_body_that_nobody_says_the_length_of_is_not_taken_for_all(encrypted_s3, monkeypatch):
    monkeypatch.setattr(http_wire, "get", lambda *_: http_wire.Answer(200, {}, b"abc"))
    with pytest.raises(StorageError, match="nobody says"):
        encrypted_s3.read("y")


@pytest.mark.parametrize(
    ("code", "status", "num_own"), [("ExpiredToken", 400, 3), ("AuthorizationHeaderMalformed", 400, 1)]
)
def test_keys_that_ended_are_no_other_place(encrypted, encrypted_s3, monkeypatch, code, status, num_own):
    """Then the general client is asked once; for a bucket of another region, from then on."""
    own, general = [], []

    def answer(request: bytes) -> bytes:
        is_own = b"aiobotocore" not in request.lower()
        (own if is_own else general).append(request)
        body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode() if is_own else b"abc"
        head = f"{status} Bad" if is_own else "206 P\r\nContent-Range: bytes 0-2/3"
        return f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    encrypted.answer = answer
    asked = []
    monkeypatch.setattr(
        s3_reads, "_ask_keys", lambda files, ask=s3_reads._ask_keys: asked.append(1) or ask(files)
    )
    for _ in range(3):
        assert encrypted_s3.read("y") == b"abc"
    assert (len(own), len(general), len(asked)) == (num_own, 3, num_own)


def test_a_request_that_came_too_slowly_is_made_again(encrypted, encrypted_s3):
    late = b"<Error><Code>RequestTimeout</Code><Message>m</Message></Error>"
    answers = iter(
        [
            b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(late) + late,
            b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-2/3\r\nContent-Length: 3\r\n\r\nabc",
        ]
    )
    encrypted.answer = lambda request: next(answers)
    assert encrypted_s3.read("y") == b"abc"
    assert not any(b"aiobotocore" in request.lower() for request in encrypted.requests)


def test_secrets_are_in_no_error_and_no_picture_of_a_value(encrypted, encrypted_s3, monkeypatch):
    keys = s3_reads._Keys("access", "secret-of-mine", "token-of-mine")
    assert "of-mine" not in repr(keys)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-mine")
    echoed = b"<Error><Code>SignatureDoesNotMatch</Code><Message>m</Message><StringToSign>token-of-mine"
    encrypted.answer = lambda request: b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % len(echoed) + echoed
    with pytest.raises(StorageError) as caught:
        encrypted_s3.read("y")
    assert b"token-of-mine" in encrypted.requests[0]
    assert "of-mine" not in str(caught.value)


def test_a_key_with_the_end_of_a_line_never_becomes_a_line_of_a_request(encrypted, encrypted_s3, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token\nx-more: 1")
    assert s3_reads.S3Reads("s3://bucket/x", "bucket").get("x/y", 0, 1) is None
    assert encrypted.requests == []


def test_keys_that_are_renewed_are_asked_for_again(encrypted, encrypted_s3, monkeypatch, tmp_path):
    """From a program here; those of a machine's role come the same way."""
    (tmp_path / "program").write_text(
        "import datetime, json, pathlib\n"
        f"number = pathlib.Path({str(tmp_path / 'number')!r})\n"
        "count = int(number.read_text()) + 1 if number.exists() else 1\n"
        "number.write_text(str(count))\n"
        "end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)\n"
        "keys = {'AccessKeyId': f'key{count}', 'SecretAccessKey': 's', 'SessionToken': f'token{count}'}\n"
        "print(json.dumps(keys | {'Version': 1, 'Expiration': end.isoformat()}))\n"
    )
    (tmp_path / "config").write_text(
        f"[profile renewed]\ncredential_process = {sys.executable} {tmp_path / 'program'}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "renewed")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    encrypted.answer = lambda request: (
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-2/3\r\nContent-Length: 3\r\n\r\nabc"
    )

    def signed_by() -> bytes:
        assert encrypted_s3.read("y") == b"abc"
        request = encrypted.requests[-1]
        key = request.partition(b"Credential=key")[2].partition(b"/")[0]
        assert b"x-amz-security-token: token%s\r\n" % key in request
        return key

    first = signed_by()
    assert signed_by() == first
    monkeypatch.setattr(s3_reads, "_CREDENTIALS_S", -1.0)
    encrypted_s3._files._reads._keys.clear()
    # They end within ten minutes, so the client asks the program each time.
    assert int(first) < int(signed_by()) < int(signed_by())
