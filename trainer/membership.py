"""A process among the members of an elastic run: who lives, who wants to join, and the next generation.

Every two processes keep a connection of their own for this: a death closes it (seen in milliseconds), a
stopped process or a cut link falls silent (seen after `silent_s`, three beats or more). Whoever sees either
ends the generation: the wires of the gradients are aborted, so the main thread gets an error wherever it
waits, and the others are told. The main thread then calls `regroup` and, with the generation that is decided
(agreement.py), `connect`.

One thread accepts, one listens and beats; the main thread does everything that may wait. All state is behind
one lock, which is never held while anything waits.

Invariant: after `regroup` has begun, this process adds nothing to the generation before: its wires are shut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from foldfeed.trainer.agreement import Member, Register, Report, View, propose
from foldfeed.trainer.errors import CommunicationError, ExcludedError, WireError
from foldfeed.trainer.lease import is_gone
from foldfeed.trainer.wire import Channel, Frames, dial, frame, greet

# Of `silent_s`: so that a beat may be late without a false alarm.
BEATS_PER_SILENCE = 8
# How often the folder is looked at while the decision is awaited, if no message comes.
LOOK_S = 0.1
# For which a member that failed by itself is waited for: the others may be about to fail alike.
FAILED_GRACE_S = 1.0
LEAVE_S = 5.0
# Between two interruptions of the steps for the same one that wants to join.
INVITE_S = 5.0
CONTROL = "member"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Times and sizes of a membership.

    Attributes:
      silent_s: without a sign of life after which a process counts as lost.
      timeout_s: for which a living member may keep the others waiting.
      max_members: of a generation; who comes later waits as a spare.
    """

    silent_s: float
    timeout_s: float
    max_members: int


class Abortable(Protocol):
    """What waits for peers in a generation."""

    def abort(self, reason: str) -> None:
        """Makes it end with an error, soon; from any thread."""
        ...


class _Peer:
    """A connection to another process."""

    def __init__(self, uid: str, connection: socket.socket) -> None:
        self.uid = uid
        self.connection = connection
        self.frames = Frames()
        self.heard = time.monotonic()
        self.bye = ""
        self.doomed: float | None = None
        self.generation = -1
        self.report: Report | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Ending:
    """Why and when a generation ended here, in seconds of the monotonic clock."""

    reason: str
    noticed: float
    silent_s: float


class Membership:
    """See the module docstring.

    Attributes:
      me: this process.
      view: the present generation.
      ending: of the last one.
    """

    def __init__(
        self, me: Member, listener: socket.socket, key: bytes, register: Register, limits: Limits
    ) -> None:
        """Starts both threads.

        Args:
          me: this process, reached by the listener's port.
          listener: listening; owned from here on.
          key: that members of this run know.
          register: decides generations.
          limits: see there.
        """
        self.me = me
        self.view = View(generation=-1, step=-1, members=())
        self.ending = Ending(reason="", noticed=time.monotonic(), silent_s=0.0)
        self._key = key
        self._register = register
        self._limits = limits
        self._lock = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._joiners: dict[str, Member] = {}
        self._invited: dict[str, float] = {}
        self._left: set[str] = set()
        self._finished: set[str] = set()
        self._over = -1
        self._wires: dict[tuple[int, str, str], socket.socket] = {}
        self._channels: list[Abortable] = []
        self._said: Report | None = None
        self._closed = False
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._threads = [
            threading.Thread(target=target, name=f"foldfeed-{name}", daemon=True)
            for name, target in (("accept", self._accept), ("members", self._serve))
        ]
        for thread in self._threads:
            thread.start()

    # ---------------------------------------------------------------- connections

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed by `leave`
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        try:
            hello = greet(connection, self._key, self._limits.silent_s)
            uid, purpose, generation = str(hello["uid"]), str(hello["purpose"]), int(hello["generation"])
        except (WireError, KeyError, TypeError, ValueError):
            connection.close()  # a stranger, or somebody who was cut off while greeting: they learn by this
            return
        with self._lock:
            if self._closed or (purpose != CONTROL and generation < self.view.generation):
                connection.close()
            elif purpose == CONTROL:
                self._add(uid, connection)
            else:
                self._wires[generation, purpose, uid] = connection
            self._lock.notify_all()

    def _add(self, uid: str, connection: socket.socket) -> None:
        if uid in self._peers:
            connection.close()
            return
        self._peers[uid] = _Peer(uid, connection)
        self._selector.register(connection, selectors.EVENT_READ, uid)

    def _dial(self, member: Member, purpose: str, generation: int) -> socket.socket:
        hello = {"uid": self.me.uid, "purpose": purpose, "generation": generation}
        return dial((member.host, member.port), self._key, hello, self._limits.silent_s)

    def _serve(self) -> None:
        beat_s = self._limits.silent_s / BEATS_PER_SILENCE
        next_beat = time.monotonic()
        while not self._closed:
            ready = self._selector.select(max(0.0, next_beat - time.monotonic()))
            with self._lock:
                for key, _ in ready:
                    if key.data is not None and key.data in self._peers:
                        self._read(self._peers[key.data])
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + beat_s
                    self._broadcast({"kind": "beat"})
                for peer in list(self._peers.values()):
                    if peer.doomed is not None and now > peer.doomed:
                        self._lose(peer, f"{peer.bye}")
                    elif now - peer.heard > self._limits.silent_s:
                        self._lose(peer, f"silent for {now - peer.heard:.1f} s")

    def _read(self, peer: _Peer) -> None:
        try:
            raw = peer.connection.recv(1 << 16, socket.MSG_DONTWAIT)
            messages = peer.frames.feed(raw)
        except BlockingIOError:
            return
        except (OSError, WireError) as error:
            self._lose(peer, str(error))
            return
        peer.heard = time.monotonic()
        for message in messages:
            try:
                self._understand(peer, message)
            except (KeyError, TypeError, ValueError) as error:
                self._lose(peer, f"a message that makes no sense: {error!r}")
                return
        if not raw:
            self._lose(peer, "its connection is closed")

    def _understand(self, peer: _Peer, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "join":
            member = Member(**message["member"])
            if member.uid != peer.uid:
                raise ValueError(f"{peer.uid} speaks for {member.uid}")
            self._joiners[peer.uid] = member
        elif kind == "report":
            peer.generation = int(message["generation"])
            peer.report = Report(step=int(message["step"]), sees=frozenset(message["sees"]))
        elif kind == "bye":
            peer.bye = str(message["reason"])
            self._left.add(peer.uid)
            if peer.bye == "finished":
                self._finished.add(peer.uid)
            else:
                peer.doomed = time.monotonic() + FAILED_GRACE_S
        if kind in ("over", "report") and peer.uid in self.view.uids:
            self._over = max(self._over, int(message["generation"]))
            if self._over == self.view.generation:
                self._end(f"{peer.uid} left generation {self._over}", 0.0)
        if kind != "beat":
            self._lock.notify_all()

    def _broadcast(self, message: dict[str, Any]) -> None:
        raw = frame(message)
        for peer in list(self._peers.values()):
            self._send(peer, raw)

    def _send(self, peer: _Peer, raw: bytes) -> None:
        try:
            sent = peer.connection.send(raw, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # Also a buffer that is full: whoever reads nothing for so long is not among the living.
            self._lose(peer, str(error))
            return
        if sent < len(raw):
            self._lose(peer, "it takes no messages")

    def _lose(self, peer: _Peer, why: str) -> None:
        if self._peers.pop(peer.uid, None) is None:
            return
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._joiners.pop(peer.uid, None)
        if peer.uid in self.view.uids and peer.bye != "finished":
            self._end(f"lost rank {self.view.uids.index(peer.uid)}: {why}", time.monotonic() - peer.heard)
        self._lock.notify_all()

    def _end(self, reason: str, silent_s: float) -> None:
        """Ends the present generation here and tells the others; again it does nothing."""
        if self.ending.reason:
            return
        self.ending = Ending(reason=reason, noticed=time.monotonic(), silent_s=silent_s)
        for channel in self._channels:
            channel.abort(reason)
        self._broadcast({"kind": "over", "generation": self.view.generation})
        self._lock.notify_all()

    # ---------------------------------------------------------------- the main thread's calls

    def found(self, num_members: int, wait_s: float) -> None:
        """Begins a run: generation 0 is this process alone, which waits for others to come.

        Args:
          num_members: to wait for, this one included.
          wait_s: after which the run begins with those that came.
        """
        alone = View(generation=0, step=-1, members=(self.me,))
        if not self._register.claim(alone):
            raise ExcludedError(0, "its session exists already")
        self._install(alone)
        deadline = time.monotonic() + wait_s
        with self._lock:
            while len(self._joiners) < num_members - 1 and (left := deadline - time.monotonic()) > 0:
                self._lock.wait(left)

    def join(self, wait_s: float, superseded: Callable[[], bool]) -> View | None:
        """Asks all members to take this process in, and waits for it, also as a spare.

        Args:
          wait_s: to look for a member.
          superseded: whether another session has begun in the folder.
        Returns: the generation with this process; None when the run finished without it.
        Raises:
          ExcludedError: no member could be reached, for ``wait_s`` or because all are gone.
        """
        deadline = time.monotonic() + wait_s
        while True:
            latest = self._register.latest()
            if latest is not None and self.me.uid in latest.uids:
                self._install(latest)
                return latest
            for member in latest.members if latest is not None else ():
                self._ask(member)
            with self._lock:
                if self._peers:
                    deadline = time.monotonic() + wait_s
                elif latest is not None and any(uid in self._finished for uid in latest.uids):
                    return None
                elif latest is None or superseded() or all(is_gone(dict(m.identity)) for m in latest.members):
                    raise ExcludedError(-1, "its members are gone")
                elif time.monotonic() > deadline:
                    raise ExcludedError(latest.generation, f"no member could be reached for {wait_s:g} s")
                self._lock.wait(LOOK_S)

    def _ask(self, member: Member) -> None:
        with self._lock:
            if member.uid in self._peers or member.uid in self._left:
                return
        with contextlib.suppress(WireError):  # the next round tries again, until the deadline
            connection = self._dial(member, CONTROL, 0)
            with self._lock:
                self._add(member.uid, connection)
                if member.uid in self._peers:
                    raw = frame({"kind": "join", "member": dataclasses.asdict(self.me)})
                    self._send(self._peers[member.uid], raw)

    def invites(self) -> bool:
        """Returns whether the ranks should meet anew, to take somebody in; asked by rank 0 at each step."""
        now = time.monotonic()
        with self._lock:
            if self.view.uids[:1] != [self.me.uid] or len(self.view.members) >= self._limits.max_members:
                return False
            new = [u for u in self._joiners if now - self._invited.get(u, -INVITE_S) >= INVITE_S]
            self._invited.update(dict.fromkeys(new, now))
            return bool(new)

    def regroup(self, step: int) -> View:
        """Leaves the present generation for good and returns the next one.

        Args:
          step: completed steps of this process; -1 without a state.
        Raises:
          ExcludedError: the others went on without this process.
        """
        started = time.monotonic()
        self._said = None
        with self._lock:
            self._end("the ranks meet anew", 0.0)
        while True:
            latest = self._register.latest()
            if latest is not None and latest.generation > self.view.generation:
                if self.me.uid not in latest.uids:
                    raise ExcludedError(latest.generation, "they had to take it for dead")
                self._install(latest)
                return latest
            with self._lock:
                proposal = self._propose(step, time.monotonic() - started)
                if proposal is None:
                    self._lock.wait(LOOK_S)
                    continue
            self._register.claim(proposal)
            with self._lock:
                self._broadcast({"kind": "view"})

    def _propose(self, step: int, waited_s: float) -> View | None:
        live = {self.me.uid, *(peer.uid for peer in self._peers.values() if not peer.bye)}
        mine = Report(step=step, sees=frozenset(live))
        if mine != self._said:
            self._said = mine
            here = {"generation": self.view.generation, "step": step, "sees": sorted(live)}
            self._broadcast({"kind": "report", **here})
        reports = {
            peer.uid: peer.report
            for peer in self._peers.values()
            if peer.report is not None and peer.generation == self.view.generation
        }
        lost = [member for member in self.view.members if member.uid not in live]
        gone = self._left | {member.uid for member in lost if is_gone(dict(member.identity))}
        return propose(
            self.view,
            self.me.uid,
            {**reports, self.me.uid: mine},
            live=live,
            gone=gone,
            joiners=list(self._joiners.values()),
            waited_s=waited_s,
            timeout_s=self._limits.timeout_s,
            max_members=self._limits.max_members,
        )

    def _install(self, view: View) -> None:
        with self._lock:
            self.view = view
            self.ending = Ending(reason="", noticed=time.monotonic(), silent_s=0.0)
            self._channels = []
            for uid in view.uids:
                self._joiners.pop(uid, None)
                self._invited.pop(uid, None)
            for key in [key for key in self._wires if key[0] < view.generation]:
                self._wires.pop(key).close()
            for peer in list(self._peers.values()):
                # Who is left out learns it by this, and from the folder.
                if peer.uid not in view.uids and peer.uid not in self._joiners:
                    self._lose(peer, "left out")
            if self._over >= view.generation:
                self._end("a member left this generation already", 0.0)

    def connect(self, names: tuple[str, ...]) -> list[Channel]:
        """Makes the wires of the present generation, one channel by name, and the missing control ones.

        Raises:
          CommunicationError: a member cannot be reached; the ranks must meet anew.
        """
        view, mine = self.view, self.view.uids.index(self.me.uid)
        found: dict[str, dict[int, socket.socket]] = {name: {} for name in names}
        try:
            for rank, member in enumerate(view.members[:mine]):
                if member.uid not in self._peers:
                    connection = self._dial(member, CONTROL, view.generation)
                    with self._lock:
                        self._add(member.uid, connection)
                for name in names:
                    found[name][rank] = self._dial(member, name, view.generation)
            self._await(found, view, mine)
        except WireError as error:
            for connections in found.values():
                for connection in connections.values():
                    connection.close()
            raise CommunicationError(
                mine, f"the meeting of generation {view.generation}", str(error)
            ) from error
        channels = [Channel(mine, found[name], self._limits.timeout_s) for name in names]
        for channel in channels:
            self.attach(channel)
        return channels

    def attach(self, group: Abortable) -> None:
        """Lets the end of the present generation abort this, too."""
        with self._lock:
            self._channels.append(group)
            if self.ending.reason:
                group.abort(self.ending.reason)

    def _await(self, found: dict[str, dict[int, socket.socket]], view: View, mine: int) -> None:
        """Waits for the connections that the members behind this one make."""
        deadline = time.monotonic() + 2 * self._limits.silent_s
        behind = dict(enumerate(view.uids))
        with self._lock:
            while True:
                for rank in range(mine + 1, len(view.members)):
                    for name, connections in found.items():
                        key = (view.generation, name, behind[rank])
                        if key in self._wires:
                            connections[rank] = self._wires.pop(key)
                missing = [
                    rank
                    for rank, uid in behind.items()
                    if rank != mine and (uid not in self._peers or any(rank not in c for c in found.values()))
                ]
                if not missing:
                    return
                if self.ending.reason or time.monotonic() > deadline:
                    raise WireError(self.ending.reason or f"ranks {missing} did not come")
                self._lock.wait(deadline - time.monotonic())

    def require_current(self) -> None:
        """Checks that this process may write for the run: it is first in the newest generation.

        Raises:
          ExcludedError: it may not.
        """
        latest = self._register.latest()
        # Not the generation that this process knows: the next one may be decided, with it still first.
        if latest is None or latest.uids[0] != self.me.uid:
            number = latest.generation if latest is not None else -1
            raise ExcludedError(number, "another rank writes the snapshots now")

    def leave(self, reason: str) -> None:
        """Says good-bye and waits a little until the others have, too, so that nobody takes it for a death.

        Args:
          reason: ``finished``, or why this process leaves alone.
        """
        deadline = time.monotonic() + LEAVE_S
        with self._lock:
            self._broadcast({"kind": "bye", "reason": reason})
            while reason == "finished" and (left := deadline - time.monotonic()) > 0:
                if not any(peer.uid in self.view.uids and not peer.bye for peer in self._peers.values()):
                    break
                self._lock.wait(left)
            self._closed = True
        self._waker.send(b"\0")
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self._wake.close()
        self._waker.close()
        self._selector.close()
        for connection in self._connections():
            connection.close()

    def _connections(self) -> Iterator[socket.socket]:
        yield from (peer.connection for peer in self._peers.values())
        yield from self._wires.values()
