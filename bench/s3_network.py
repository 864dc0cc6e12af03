"""A real S3 server behind a link of some width, or some milliseconds away; for `loader_s3.py`.

    python bench/s3_network.py --relay HOST PORT MS      prints its own port, relays until its input ends

The server runs in a network namespace of its own, at the other end of a pair of interfaces; what it sends is
shaped by tc (token bucket), so needs root. Latency comes from a relay, because not every kernel can delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from s3_server import running_server

OURS, THEIRS = "10.83.7.1", "10.83.7.2"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Network:
    """The way to a running server.

    Attributes:
      endpoint: of the server.
      can_shape: whether the link can be made narrow.
      server_pid: of the server.
    """

    def __init__(self, endpoint: str, namespace: str, server_pid: int) -> None:
        self.endpoint = endpoint
        self.can_shape = bool(namespace)
        self.server_pid = server_pid
        self._namespace = namespace

    @contextlib.contextmanager
    def narrow(self, mbit: int) -> Iterator[None]:
        """Lets the server send so many Mbit/s."""
        shape = ["tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "100ms"]
        _run("ip", "netns", "exec", self._namespace, "tc", "qdisc", "add", "dev", "eth0", "root", *shape)
        try:
            yield
        finally:
            _run("ip", "netns", "exec", self._namespace, "tc", "qdisc", "del", "dev", "eth0", "root")

    @contextlib.contextmanager
    def far(self, latency_ms: float) -> Iterator[tuple[str, int]]:
        """Yields the endpoint of a relay that passes every request on after a latency, and its process id."""
        address = urlsplit(self.endpoint)
        command = [sys.executable, __file__, "--relay", str(address.hostname), str(address.port)]
        with subprocess.Popen(
            [*command, str(latency_ms)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as relay:
            assert relay.stdin is not None
            assert relay.stdout is not None
            yield f"http://127.0.0.1:{int(relay.stdout.readline())}", relay.pid
            relay.stdin.close()


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Yields a server and the way to it: on loopback where nobody may make namespaces."""
    if os.geteuid() != 0:
        with running_server(folder) as endpoint:
            yield Network(endpoint, "", int((folder / "pid").read_text()))
        return
    # A link is taken down in the background, so its name is new each time.
    name, link = f"s3-bench{os.getpid()}", f"ffs3-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "addr", "add", f"{OURS}/30", "dev", link)
        _run("ip", "link", "set", link, "up")
        _run("ip", "-n", name, "addr", "add", f"{THEIRS}/30", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        with running_server(folder, THEIRS, ("ip", "netns", "exec", name)) as endpoint:
            yield Network(endpoint, name, int((folder / "pid").read_text()))
    finally:
        # The interfaces go with it.
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)


def cpu_s(pid: int) -> float:
    """Returns the CPU seconds of a process so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


async def _relay(host: str, port: int, latency_s: float) -> None:
    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late_s: float) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                await asyncio.sleep(late_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)
        await asyncio.gather(forward(reader, back, latency_s), forward(there, writer, 0.0))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=128)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


if __name__ == "__main__" and sys.argv[1:2] == ["--relay"]:
    asyncio.run(_relay(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) / 1e3))
