"""A process among the members of an elastic run: who lives, who wants to join, and the next generation.

Whoever sees that a peer is lost (peers.py) ends the generation: the wires of the gradients are aborted, so
the main thread gets an error wherever it waits, and the others are told. The main thread then calls `regroup`
and, with the generation that is decided (agreement.py), `connect`; it does everything that may wait.

Invariant: after `regroup` has begun, this process adds nothing to the generation before: its wires are shut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from foldfeed.trainer.errors import CommunicationError, ExcludedError, TrainerError, WireError
from foldfeed.trainer.groups.wire import MeshGroup, frame
from foldfeed.trainer.members.agreement import FolderRegister, Member, Report, View, propose
from foldfeed.trainer.members.peers import CONTROL, Peer, Peers
from foldfeed.trainer.members.session import Session, folder_of, read_session
from foldfeed.trainer.state.lease import identity, is_gone
from foldfeed.trainer.state.snapshot import RUN_FILE

# How often the folder is looked at while the decision is awaited, if no message comes.
LOOK_S = 0.1
# For which a member that failed by itself is waited for: the others may be about to fail alike.
FAILED_GRACE_S = 1.0
LEAVE_S = 5.0
# Between two interruptions of the steps for the same one that wants to join.
INVITE_S = 5.0


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
        self, output: Path, session: Session, host: str, place: Sequence[str], limits: Limits
    ) -> None:
        """Makes this process one that may become a member, and starts both threads.

        Args:
          output: the run's folder.
          session: that lives there.
          host: where the others reach this process.
          place: where it stands, see topology.py.
          limits: see there.
        """
        listener = socket.create_server((host, 0), backlog=1024)
        self.me = Member(
            uid=secrets.token_hex(8),
            host=host,
            port=listener.getsockname()[1],
            identity=identity(),
            place="/".join(place),
        )
        self.view = View(generation=-1, step=-1, members=())
        self.ending = Ending(reason="", noticed=time.monotonic(), silent_s=0.0)
        self._output, self._session = output, session
        self._register = FolderRegister(folder_of(output, session))
        self._limits = limits
        self._joiners: dict[str, Member] = {}
        self._invited: dict[str, float] = {}
        # Why they did, by uid.
        self._left: dict[str, str] = {}
        self._over = -1
        self._channels: list[Abortable] = []
        self._said: Report | None = None
        # Last: it begins to talk at once.
        self._peers = Peers(self.me.uid, listener, session.key, limits.silent_s, self)

    # ---------------------------------------------------------------- what peers say; the lock is held

    def understand(self, peer: Peer, message: Mapping[str, Any]) -> None:
        """See `peers.Owner`."""
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
            self._left[peer.uid] = peer.bye
            if peer.bye != "finished":
                peer.doomed = time.monotonic() + FAILED_GRACE_S
        if kind in ("over", "report") and peer.uid in self.view.uids:
            self._over = max(self._over, int(message["generation"]))
            if self._over == self.view.generation:
                silent_s = float(message.get("silent_s", 0.0))
                self._end(f"rank {self.view.uids.index(peer.uid)} left it", silent_s)
        if kind != "beat":
            self._peers.lock.notify_all()

    def lost(self, peer: Peer, why: str) -> None:
        """See `peers.Owner`."""
        self._joiners.pop(peer.uid, None)
        if peer.uid in self.view.uids and peer.bye != "finished":
            self._end(f"lost rank {self.view.uids.index(peer.uid)}: {why}", time.monotonic() - peer.heard)

    def _end(self, reason: str, silent_s: float) -> None:
        """Ends the present generation here and tells the others; again it does nothing."""
        if self.ending.reason:
            return
        self.ending = Ending(reason=reason, noticed=time.monotonic(), silent_s=silent_s)
        for channel in self._channels:
            channel.abort(reason)
        self._peers.broadcast({"kind": "over", "generation": self.view.generation, "silent_s": silent_s})
        self._peers.lock.notify_all()

    # ---------------------------------------------------------------- the main thread's calls

    def found(self) -> None:
        """Begins a run: generation 0 is this process alone."""
        alone = View(generation=0, step=-1, members=(self.me,))
        if not self._register.claim(alone):
            raise ExcludedError(0, "its session exists already")
        self._install(alone)

    def gather(self, num_members: int, wait_s: float) -> int:
        """Waits for others to come; returns how many are there.

        Args:
          num_members: to wait for, this one included.
          wait_s: after which the run begins with those that came.
        """
        deadline = time.monotonic() + wait_s
        with self._peers.lock:
            while len(self._joiners) < num_members - 1 and (left := deadline - time.monotonic()) > 0:
                self._peers.lock.wait(left)
            return len(self._joiners) + 1

    def join(self, wait_s: float) -> View | None:
        """Asks all members to take this process in, and waits for it, also as a spare.

        Args:
          wait_s: to look for a member.
        Returns: the generation with this process; None when the run finished without it.
        Raises:
          ExcludedError: no member could be reached, for ``wait_s`` or because all are gone.
        """
        deadline = time.monotonic() + wait_s
        while True:
            latest = self._latest()
            if latest is not None and self.me.uid in latest.uids:
                self._install(latest)
                return latest
            for member in latest.members if latest is not None else ():
                self._ask(member)
            with self._peers.lock:
                if self._peers.known:
                    deadline = time.monotonic() + wait_s
                elif latest is not None and any(self._left.get(uid) == "finished" for uid in latest.uids):
                    return None
                elif latest is not None and all(is_gone(dict(one.identity)) for one in latest.members):
                    raise ExcludedError(latest.generation, "its ranks are gone")
                elif self._is_superseded():
                    raise ExcludedError(-1, "another session has begun")
                elif time.monotonic() > deadline:
                    number = latest.generation if latest is not None else -1
                    raise ExcludedError(number, f"no member could be reached for {wait_s:g} s")
                self._peers.lock.wait(LOOK_S)

    def _latest(self) -> View | None:
        """Returns the newest generation of this process's session.

        Raises:
          ExcludedError: all that this process knew are gone, and another session has begun.
          TrainerError: the folder cannot be read.
        """
        try:
            return self._register.latest()
        except TrainerError as error:
            # Where the whole run was removed, nobody is to begin it anew.
            if self._is_superseded() and (self._output / RUN_FILE).exists():
                raise ExcludedError(-1, "another session has begun") from error
            raise

    def _is_superseded(self) -> bool:
        """Returns whether another session has begun in the folder."""
        return read_session(self._output).name != self._session.name

    def _ask(self, member: Member) -> None:
        with self._peers.lock:
            if member.uid in self._peers.known or member.uid in self._left:
                return
        with contextlib.suppress(WireError):  # the next round tries again, until the deadline
            connection = self._peers.dial(member, CONTROL, 0)
            with self._peers.lock:
                self._peers.add(member.uid, connection)
                if member.uid in self._peers.known:
                    raw = frame({"kind": "join", "member": dataclasses.asdict(self.me)})
                    self._peers.send(self._peers.known[member.uid], raw)

    def invites(self) -> bool:
        """Returns whether the ranks should meet anew, to take somebody in; asked by rank 0 at each step."""
        now = time.monotonic()
        with self._peers.lock:
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
        with self._peers.lock:
            self._end("the ranks meet anew", 0.0)
        while True:
            latest = self._latest()
            if latest is not None and latest.generation > self.view.generation:
                if self.me.uid not in latest.uids:
                    raise ExcludedError(latest.generation, "they had to take it for dead")
                self._install(latest)
                return latest
            with self._peers.lock:
                proposal = self._propose(step, time.monotonic() - started)
                if proposal is None:
                    self._peers.lock.wait(LOOK_S)
                    continue
            self._register.claim(proposal)
            with self._peers.lock:
                self._peers.broadcast({"kind": "view"})

    def _propose(self, step: int, waited_s: float) -> View | None:
        live = {self.me.uid, *(peer.uid for peer in self._peers.known.values() if not peer.bye)}
        mine = Report(step=step, sees=frozenset(live))
        if mine != self._said:
            self._said = mine
            here = {"generation": self.view.generation, "step": step, "sees": sorted(live)}
            self._peers.broadcast({"kind": "report", **here})
        reports = {
            peer.uid: peer.report
            for peer in self._peers.known.values()
            if peer.report is not None and peer.generation == self.view.generation
        }
        lost = [member for member in self.view.members if member.uid not in live]
        gone = set(self._left) | {member.uid for member in lost if is_gone(dict(member.identity))}
        return propose(
            self.view,
            self.me.uid,
            {**reports, self.me.uid: mine},
            live=live,
            gone=gone,
            joiners=list(self._joiners.values()),
            waited_s=waited_s,
            timeout_s=self._limits.timeout_s,
            # The other half of a cut notices it within a beat of this one, and decides at once if it may.
            patience_s=self._limits.silent_s,
            max_members=self._limits.max_members,
        )

    def _install(self, view: View) -> None:
        with self._peers.lock:
            self.view = view
            self.ending = Ending(reason="", noticed=time.monotonic(), silent_s=0.0)
            self._channels = []
            for uid in view.uids:
                self._joiners.pop(uid, None)
                self._invited.pop(uid, None)
            for key in [key for key in self._peers.wires if key[0] < view.generation]:
                self._peers.wires.pop(key).close()
            for peer in list(self._peers.known.values()):
                # Who is left out learns it by this, and from the folder.
                if peer.uid not in view.uids and peer.uid not in self._joiners:
                    self._peers.lose(peer, "left out")
            if self._over >= view.generation:
                self._end("a member left this generation already", 0.0)

    def connect(self, names: tuple[str, ...]) -> list[MeshGroup]:
        """Makes the wires of the present generation, one group by name, and the missing control ones.

        Raises:
          CommunicationError: a member cannot be reached; the ranks must meet anew.
        """
        view, mine = self.view, self.view.uids.index(self.me.uid)
        found: dict[str, dict[int, socket.socket]] = {name: {} for name in names}
        try:
            for rank, member in enumerate(view.members[:mine]):
                if member.uid not in self._peers.known:
                    connection = self._peers.dial(member, CONTROL, view.generation)
                    with self._peers.lock:
                        self._peers.add(member.uid, connection)
                for name in names:
                    found[name][rank] = self._peers.dial(member, name, view.generation)
            self._await(found, view, mine)
        except WireError as error:
            for connections in found.values():
                for connection in connections.values():
                    connection.close()
            raise CommunicationError(
                mine, f"the meeting of generation {view.generation}", str(error)
            ) from error
        groups = [MeshGroup(mine, found[name], self._limits.timeout_s) for name in names]
        for group in groups:
            self.attach(group)
        return groups

    def attach(self, group: Abortable) -> None:
        """Lets the end of the present generation abort this, too."""
        with self._peers.lock:
            self._channels.append(group)
            if self.ending.reason:
                group.abort(self.ending.reason)

    def _await(self, found: dict[str, dict[int, socket.socket]], view: View, mine: int) -> None:
        """Waits for the connections that the members behind this one make."""
        deadline = time.monotonic() + 2 * self._limits.silent_s
        behind = dict(enumerate(view.uids))
        with self._peers.lock:
            while True:
                for rank in range(mine + 1, len(view.members)):
                    for name, connections in found.items():
                        key = (view.generation, name, behind[rank])
                        if key in self._peers.wires:
                            connections[rank] = self._peers.wires.pop(key)
                ready = set(behind).intersection(*found.values())
                missing = [
                    rank
                    for rank, uid in behind.items()
                    if rank != mine and (uid not in self._peers.known or rank not in ready)
                ]
                if not missing:
                    return
                if self.ending.reason or time.monotonic() > deadline:
                    raise WireError(self.ending.reason or f"ranks {missing} did not come")
                self._peers.lock.wait(deadline - time.monotonic())

    def require_current(self, *, first: bool = True) -> None:
        """Checks that this process may write for the run.

        Args:
          first: it must be first in the newest generation; otherwise a member will do.
        Raises:
          ExcludedError: it may not.
        """
        latest = self._latest()
        # Not the generation that this process knows: the next one may be decided, with it still there.
        if latest is None or self.me.uid not in latest.uids[: 1 if first else None]:
            number = latest.generation if latest is not None else -1
            raise ExcludedError(number, "another rank writes the snapshots now")

    def leave(self, reason: str) -> None:
        """Says good-bye and waits a little until the others have, too, so that nobody takes it for a death.

        Args:
          reason: ``finished``, or why this process leaves alone.
        """
        deadline = time.monotonic() + LEAVE_S
        with self._peers.lock:
            self._peers.broadcast({"kind": "bye", "reason": reason})
            while reason == "finished" and (left := deadline - time.monotonic()) > 0:
                if all(peer.bye or peer.uid not in self.view.uids for peer in self._peers.known.values()):
                    break
                self._peers.lock.wait(left)
        self._peers.close()
