"""Network namespaces for `foldfeed.trainer.prove`: every rank a machine of its own, whose link can be cut.

Each slot gets a namespace with one veth pair, whose other end is a port of a bridge. Cutting sets the port
down: packets vanish, no connection is closed, as when a cable is pulled. Needs root and ``ip`` (iproute2).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

from foldfeed.trainer.errors import TrainerConfigError


class Network:
    """A bridge and one namespace per slot, see `namespaces`."""

    def __init__(self, slots: int) -> None:
        self._slots = range(slots)
        # Interface names have at most 15 characters; the process number keeps two runs apart.
        self._name = f"ff{os.getpid() % 1_000_000}"
        self._bridge = f"{self._name}b"
        self._net = f"10.231.{os.getpid() % 250}"

    def place(self, slot: int) -> tuple[list[str], str]:
        """Returns what runs a command in a slot's namespace, and its address there."""
        space, address, _ = self.names(slot)
        return ["ip", "netns", "exec", space], address

    def names(self, slot: int) -> list[str]:
        """Returns a slot's namespace, its address there, and the port of the bridge that leads to it."""
        return [f"{self._name}-{slot}", f"{self._net}.{slot + 1}", f"{self._name}v{slot}"]

    def cut(self, slot: int) -> None:
        """Cuts a slot's link; its connections stay open and silent."""
        self._ip("link", "set", self.names(slot)[2], "down")

    def heal(self, slot: int) -> None:
        """Connects a slot again."""
        self._ip("link", "set", self.names(slot)[2], "up")

    def _make(self) -> None:
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("link", "set", self._bridge, "up")
        for slot in self._slots:
            space, address, port = self.names(slot)
            self._ip("netns", "add", space)
            self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("link", "set", port, "master", self._bridge, "up")
            self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for slot in self._slots:
            space, _, port = self.names(slot)
            # By itself: with the namespace it goes later, in the background, and its name stays taken.
            self._delete("link", port)
            self._delete("netns", space)
        self._delete("link", self._bridge)

    def _delete(self, kind: str, name: str) -> None:
        # What was never made is not there to be removed.
        with contextlib.suppress(TrainerConfigError):
            self._ip(kind, "del", name)

    def _ip(self, *arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise TrainerConfigError(
                f"chaos cut=NUMBER needs network namespaces, and `ip {' '.join(arguments)}` failed here: "
                f"{done.stderr.strip()}. Run it as root (with CAP_NET_ADMIN and CAP_SYS_ADMIN)."
            )


@contextlib.contextmanager
def namespaces(slots: int) -> Iterator[Network]:
    """Makes a network, and removes it at the end.

    Args:
      slots: 1 to 250.
    Raises:
      TrainerConfigError: namespaces cannot be made here.
    """
    if shutil.which("ip") is None:
        raise TrainerConfigError("chaos cut=NUMBER needs the command ip (iproute2), which is not here.")
    network = Network(slots)
    try:
        network._make()
        yield network
    finally:
        network._remove()
