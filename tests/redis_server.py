"""A real Redis server on loopback, for the tests of the loader's cache."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

PASSWORD = "open-sesame"


class RedisServer:
    """A server that can be killed and started again on its port."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        self.port = free_port()
        self._ports = ["--port", "0", "--tls-port"] if tls else ["--port"]
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        command = [redis_binary(), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        command += [*self._ports, str(self.port), *self._options]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        for _ in range(400):
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()[-1000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return
            time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)


def redis_binary() -> str:
    pytest.importorskip("redis", reason="no redis: pip install 'foldfeed[redis]'")
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("no redis-server on PATH: apt-get install redis-server")
    return found


@contextlib.contextmanager
def running_redis(folder: Path, *options: str, tls: bool = False) -> Iterator[RedisServer]:
    folder.mkdir(exist_ok=True)
    server = RedisServer(folder, *options, tls=tls)
    try:
        yield server
    finally:
        server.kill()
