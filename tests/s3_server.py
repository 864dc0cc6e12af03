"""A real S3-compatible server on loopback, for the tests of object stores."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

ACCESS, SECRET = "tester", "secretkey"
BUCKET = "bucket"


def server_binary() -> Path:
    """The server: named, built by `make s3-server` beside this Python, or on PATH; else a skip."""
    named = os.environ.get("FOLDFEED_S3_SERVER")
    if named:
        return Path(named)
    built = Path(sys.executable).parent / "versitygw"
    if built.is_file():
        return built
    found = shutil.which("versitygw")
    if found is None:
        pytest.skip("no S3 server (versitygw): run `make s3-server`, or set FOLDFEED_S3_SERVER")
    return Path(found)


@contextlib.contextmanager
def running_server(folder: Path, host: str = "127.0.0.1", within: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the endpoint of a server with one empty bucket; files under ``folder``.

    ``within`` is the beginning of a command that becomes it elsewhere, where ``host`` is its address. Its
    process id is in the file ``pid``.
    """
    binary = server_binary()
    for name in ("data", "metadata", "accounts"):
        (folder / name).mkdir()
    (folder / "data" / BUCKET).mkdir()
    for _ in range(5):
        # Another program may take the port before the server does.
        port = free_port()
        process = _start([*within, str(binary), "--port", f"{host}:{port}"], folder)
        (folder / "pid").write_text(str(process.pid))
        try:
            if _answers(process, host, port):
                yield f"http://{host}:{port}"
                return
        finally:
            process.terminate()
            process.wait(10)
    raise AssertionError(f"{binary} does not start: {(folder / 'log').read_text()[-2000:]}")


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    command += ["--quiet", "--keep-alive", "--iam-dir", str(folder / "accounts")]
    # Metadata in files of their own, because not every file system has extended attributes.
    command += ["posix", "--sidecar", str(folder / "metadata"), str(folder / "data")]
    environment = {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET, "PATH": os.environ["PATH"]}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _answers(process: subprocess.Popen, host: str, port: int) -> bool:
    for _ in range(200):
        if process.poll() is not None:
            return False
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            return True
        time.sleep(0.05)
    return False


def client_environment(endpoint: str) -> dict[str, str]:
    """The variables that send a client there, and nowhere else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


FOREIGN_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_SKIP_SIGNATURE")
