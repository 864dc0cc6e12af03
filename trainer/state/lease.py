"""The lease of a run's folder: while one run lives in it, a second one is refused.

A small file that only one creator can make (O_EXCL, which network file systems keep) and that its holder
touches again and again. It names host, process and time, so that a person can find the holder. No locks: many
network file systems have none, or keep them for the dead.

A lease is stale when its process is gone (same machine) or when it was not touched for `lease_s` (anywhere).
Age is counted between two times that the folder's own file system gave, so clocks of machines need not agree.
A stale lease is removed by one process at a time before a new one is made; of two that try, one wins. Thread
safety: one thread beats, the others only call `require` and `release`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foldfeed.feature_store.errors import StorageFullError
from foldfeed.feature_store.storage import LocalBlobs
from foldfeed.trainer.errors import LeaseHeldError, LeaseLostError
from foldfeed.trainer.processes import START_TICKS, STATE, boot_id, stat_of

LEASE_FILE = "run.lease"
# A holder may miss this many touches before it counts as dead.
BEATS_PER_LEASE = 6
# It becomes part of a file's name.
TOKEN = re.compile("[0-9a-z]{1,64}")


class Lease:
    """A run's right to write into its folder.

    Attributes:
      path: of the file.
      lease_s: seconds without a touch after which a lease is stale.
      token: of the lease, "" before there is one; the ranks of an elastic run have one together.
    """

    def __init__(self, folder: Path, lease_s: float, say: Callable[[str], None]) -> None:
        """Takes nothing yet.

        Args:
          folder: of the run.
          lease_s: see the class.
          say: prints a line for the person who started the run.
        """
        self.path = folder / LEASE_FILE
        self.lease_s = lease_s
        self._say = say
        self.token = ""
        self._ended = threading.Event()
        self._beat: threading.Thread | None = None

    def take(self, wait: bool = False) -> None:
        """Takes the lease and keeps it fresh until `release`.

        Args:
          wait: of another machine's run wait until its lease is stale, instead of being refused: for a
            restart, whose predecessor may have died elsewhere.
        Raises:
          LeaseHeldError: another run lives in the folder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 2 * self.lease_s
        # Of a run that went on without this process and that nobody is left of.
        own = {"token": self.token, **identity()}
        while not self._create():
            holder = self._read()
            if holder is None:
                continue
            age_s = self._age_s(self.path)
            gone = is_gone(holder) or holder == own
            if not gone and age_s < self.lease_s:
                if not wait or is_here(holder) or time.monotonic() > deadline:
                    host, pid = str(holder.get("host")), int(holder.get("pid", 0))
                    raise LeaseHeldError(str(self.path), host, pid, age_s, self.lease_s)
                time.sleep(self.lease_s / BEATS_PER_LEASE)
                continue
            if self._remove_stale(str(holder.get("token", "unknown"))):
                why = "its process is gone" if gone else f"it was not renewed for {age_s:.0f} s"
                who = f"process {holder.get('pid')} on {holder.get('host')}"
                if holder != own:
                    self._say(f"took over the lease of {who}: {why}")
        self._start_to_beat()

    def hold(self) -> None:
        """Keeps the shared lease fresh from now on; whoever is first does.

        Raises:
          LeaseLostError: another run has taken it over.
        """
        if self._beat is not None:
            return
        holder = self._read()
        if holder and holder.get("token") != self.token:
            raise LeaseLostError(str(self.path), str(holder.get("host")))
        self._sign()
        self._start_to_beat()

    def let_go(self) -> None:
        """Leaves the lease to another rank of this run."""
        if self._beat is not None:
            self._ended.set()
            self._beat.join()
            self._beat = None

    def _start_to_beat(self) -> None:
        self._ended.clear()
        self._beat = threading.Thread(target=self._keep_fresh, name="lease", daemon=True)
        self._beat.start()

    def _sign(self) -> None:
        LocalBlobs(self.path.parent).write_atomic(LEASE_FILE, _signed(self.token))

    def _remove_stale(self, token: str) -> bool:
        """Removes a stale lease; returns whether it was this process that did.

        Of many that found the same lease stale, the one that can create the claim removes it, and looks once
        more before: a lease that was made meanwhile has another token. Whoever creates the next one holds it.
        """
        claim = self.path.with_name(f"{LEASE_FILE}.{token}.claim")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            # Its maker is at work, or died at it; then the claim grows old like a lease.
            if self._age_s(claim) > self.lease_s:
                claim.unlink(missing_ok=True)
            time.sleep(0.02)
            return False
        try:
            holder = self._read()
            if holder is None or str(holder.get("token", "unknown")) != token:
                return False
            self.path.unlink()
            return True
        finally:
            claim.unlink(missing_ok=True)

    def require(self) -> None:
        """Checks that the lease is still ours; called before anything is written for good.

        Raises:
          LeaseLostError: it is gone, or another run has taken it over.
        """
        holder = self._read()
        if holder is None or holder.get("token") != self.token:
            raise LeaseLostError(str(self.path), str((holder or {}).get("host", "")))

    def release(self) -> None:
        """Gives the lease back, if it was taken and is still ours."""
        if self._beat is None:
            return
        self.let_go()
        holder = self._read()
        if holder is not None and holder.get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        token = secrets.token_hex(8)
        try:
            with self.path.open("xb") as file:
                file.write(_signed(token))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        self.token = token
        return True

    def _read(self) -> dict[str, Any] | None:
        """Returns what the file says; {} if it is damaged or not written yet, None when there is none."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        if not isinstance(found, dict) or type(found.get("pid")) is not int:
            return {}
        return found if TOKEN.fullmatch(str(found.get("token", ""))) else {}

    def _age_s(self, path: Path) -> float:
        """Returns how long ago a file was touched, by the clock of the file system alone."""
        probe = self.path.with_name(f"{LEASE_FILE}.{secrets.token_hex(8)}")
        try:
            probe.touch()
            now = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
        try:
            # A time ahead is not of this clock as it is now: it was set back, or the file was copied here.
            return abs(now - path.stat().st_mtime)
        except FileNotFoundError:
            return 0.0  # gone meanwhile: not stale, and the next look sees it

    def _keep_fresh(self) -> None:
        beat_s = self.lease_s / BEATS_PER_LEASE
        before = time.monotonic()
        while not self._ended.wait(beat_s):
            # A process that was stopped may have been left out, which its main thread finds out meanwhile.
            was_stopped = time.monotonic() - before > 2 * beat_s
            before = time.monotonic()
            # Whoever took the lease over is told by `require`; this thread has nobody to tell.
            # A network file system may fail for a moment, and the next beat tries again: one that is missed
            # says nothing, and a lease that was lost is found by `require`.
            with contextlib.suppress(OSError, StorageFullError):
                holder = self._read()
                if holder is not None and holder.get("token") not in (None, self.token):
                    return
                if holder and not was_stopped and holder != {"token": self.token, **identity()}:
                    self._sign()  # over that of a former first rank of this run, which woke up late
                # The path is set to the file system's own time, not to this machine's.
                os.utime(self.path)


def _signed(token: str) -> bytes:
    return json.dumps({"token": token, **identity()}, indent=1).encode() + b"\n"


def identity() -> dict[str, Any]:
    """Returns who this process is: host and number space of processes, number, and time of its start."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
    }


def is_here(holder: dict[str, Any]) -> bool:
    """Returns whether a holder's process would be seen from here: same boot, same number space."""
    return holder.get("machine") == _machine()


def is_gone(holder: dict[str, Any]) -> bool:
    """Returns whether a holder's process is known to have ended; its number may be another's by now."""
    return is_here(holder) and _start_of(int(holder.get("pid", 0))) != holder.get("started")


def _machine() -> str:
    space = Path("/proc/self/ns/pid")
    if not boot_id() or not space.exists():
        return f"unknown {secrets.token_hex(8)}"
    return f"{boot_id()} {space.stat().st_ino}"


def _start_of(pid: int) -> str:
    """Returns when a process started, in ticks since the boot; "" when there is none (or it is a zombie)."""
    fields = stat_of(pid)
    return fields[START_TICKS] if fields and fields[STATE] not in "ZX" else ""
