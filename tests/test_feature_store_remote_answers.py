"""Answers to reads of S3's objects: over TLS, other bytes than were asked for, and what is no data."""

import contextlib
import datetime
import socket
import ssl
import threading

import pytest
from s3_server import FOREIGN_VARIABLES, client_environment

from foldfeed.feature_store.errors import StorageError
from foldfeed.feature_store.storage import http_wire, open_blobs

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
