"""Connections to the other processes of an elastic run: made, greeted, listened to, and found dead.

Every two processes keep a connection of their own for this, apart from those that carry gradients: a death
closes it (seen in milliseconds), a stopped process or a cut link falls silent (seen after `silent_s`, of
which a beat is an eighth). One thread accepts (meeting.py), one listens and beats.

Does not own: what messages mean, who is a member (membership.py). All state is behind one lock, which is
never held while anything waits.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from foldfeed.trainer.errors import WireError
from foldfeed.trainer.groups.meeting import Greeter
from foldfeed.trainer.groups.wire import Frames, dial, frame
from foldfeed.trainer.members.agreement import Member, Report

# Of `silent_s`: so that a beat may be late without a false alarm.
BEATS_PER_SILENCE = 8
# The purpose of the connections that are listened to here; others carry gradients.
CONTROL = "member"


class Peer:
    """A connection to another process.

    Attributes:
      uid: of the process.
      heard: when it last said anything, in seconds of the monotonic clock.
      bye: why it left, "" while it has not.
      doomed: when it counts as lost after it left by itself; None for never.
      generation: of its report.
      report: the last one.
    """

    def __init__(self, uid: str, connection: socket.socket) -> None:
        self.uid = uid
        self.connection = connection
        self.frames = Frames()
        self.heard = time.monotonic()
        self.bye = ""
        self.doomed: float | None = None
        self.generation = -1
        self.report: Report | None = None


class Owner(Protocol):
    """Who is told what happens; called with the lock held."""

    def understand(self, peer: Peer, message: Mapping[str, Any]) -> None:
        """Takes a message; raises KeyError, TypeError or ValueError for one that makes no sense."""

    def lost(self, peer: Peer, why: str) -> None:
        """Takes note that a connection is gone."""


class Peers:
    """See the module docstring.

    Attributes:
      lock: of everything here and of the owner's state; notified when something happened.
      known: living connections by uid.
      wires: connections for gradients that came and were not taken yet, by (generation, purpose, uid).
    """

    def __init__(self, uid: str, listener: socket.socket, key: bytes, silent_s: float, owner: Owner) -> None:
        """Begins to listen.

        Args:
          uid: of this process.
          listener: listening; owned from here on.
          key: that members of this run know.
          silent_s: without a sign of life after which a process counts as lost.
          owner: see there.
        """
        self.lock = threading.Condition()
        self.known: dict[str, Peer] = {}
        self.wires: dict[tuple[int, str, str], socket.socket] = {}
        self._uid = uid
        self._key = key
        self._silent_s = silent_s
        self._owner = owner
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="foldfeed-members", daemon=True)
        self._thread.start()
        fields = {"uid": str, "purpose": str, "generation": int}
        self._greeter = Greeter(listener, key, silent_s, fields, self._greeted)

    def _greeted(self, connection: socket.socket, uid: str, purpose: str, generation: int) -> None:
        with self.lock:
            if self._closed:
                connection.close()
            elif purpose == CONTROL:
                self.add(uid, connection)
            else:
                self.wires[generation, purpose, uid] = connection
            self.lock.notify_all()

    def add(self, uid: str, connection: socket.socket) -> None:
        """Listens to a greeted connection from now on; the lock is held."""
        if uid in self.known:
            connection.close()
            return
        self.known[uid] = Peer(uid, connection)
        self._selector.register(connection, selectors.EVENT_READ, uid)

    def dial(self, member: Member, purpose: str, generation: int) -> socket.socket:
        """Connects to a member.

        Raises:
          WireError: it cannot be reached.
        """
        hello = {"uid": self._uid, "purpose": purpose, "generation": generation}
        return dial((member.host, member.port), self._key, hello, self._silent_s)

    def _serve(self) -> None:
        beat_s = self._silent_s / BEATS_PER_SILENCE
        next_beat = time.monotonic()
        while not self._closed:
            ready = self._selector.select(max(0.0, next_beat - time.monotonic()))
            with self.lock:
                for key, _ in ready:
                    if key.data is not None and key.data in self.known:
                        self._read(self.known[key.data])
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + beat_s
                    self.broadcast({"kind": "beat"})
                for peer in list(self.known.values()):
                    if peer.doomed is not None and now > peer.doomed:
                        self.lose(peer, f"{peer.bye}")
                    elif now - peer.heard > self._silent_s:
                        self.lose(peer, f"silent for {now - peer.heard:.1f} s")

    def _read(self, peer: Peer) -> None:
        try:
            raw = peer.connection.recv(1 << 16, socket.MSG_DONTWAIT)
            messages = peer.frames.feed(raw)
        except BlockingIOError:
            return
        except (OSError, WireError) as error:
            self.lose(peer, str(error))
            return
        peer.heard = time.monotonic()
        for message in messages:
            try:
                self._owner.understand(peer, message)
            except (KeyError, TypeError, ValueError) as error:
                self.lose(peer, f"a message that makes no sense: {error!r}")
                return
        if not raw:
            self.lose(peer, "its connection is closed")

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Tells all; the lock is held."""
        raw = frame(message)
        for peer in list(self.known.values()):
            self.send(peer, raw)

    def send(self, peer: Peer, raw: bytes) -> None:
        """Sends a message without waiting; the lock is held."""
        try:
            sent = peer.connection.send(raw, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # Also a buffer that is full: whoever reads nothing for so long is not among the living.
            self.lose(peer, str(error))
            return
        if sent < len(raw):
            self.lose(peer, "it takes no messages")

    def lose(self, peer: Peer, why: str) -> None:
        """Closes a connection and tells the owner; the lock is held."""
        if self.known.pop(peer.uid, None) is None:
            return
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._owner.lost(peer, why)
        self.lock.notify_all()

    def close(self) -> None:
        """Ends the threads and closes all connections."""
        with self.lock:
            self._closed = True
        self._greeter.close()
        self._waker.send(b"\0")
        self._thread.join()
        for connection in (self._wake, self._waker, *self.wires.values()):
            connection.close()
        for peer in self.known.values():
            peer.connection.close()
        self._selector.close()
