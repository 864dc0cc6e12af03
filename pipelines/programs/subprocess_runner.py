"""Runs one external program and owns it until nothing of it is left.

Owns the child: it gets its own session and process group; its output goes to files, never to pipes (a full
pipe stops a worker for ever); the group is killed on timeout, on cancellation and on any error here. A killed
worker leaves no orphan: the kernel kills the program when the thread that started it dies, and a warden
(`programs.warden`) whatever the program started. A worker whose engine is gone kills its
programs itself (`follow_parent`). Wall time, CPU time, peak memory, bytes read and energy are recorded.
Does not own what the program means: see `tools.jackhmmer` and `tools.hhblits`.

Invariant: when `run_program` returns or raises, and when the block of `running` ends, no process of the group
exists any more. Safe to call from several threads at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from foldfeed.feature_store.errors import StorageFullError
from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.errors import CancelledError, ToolFailedError, ToolTimeoutError
from foldfeed.pipelines.programs.energy import EnergyMeter
from foldfeed.pipelines.programs.warden import Warden

# What is kept of a program's messages: enough for its last words, little enough for a receipt.
TAIL_BYTES = 8192

# A program that failed with less than this left on its disk is taken to have failed for want of space.
NEARLY_FULL_BYTES = 64 << 10

# First and longest pause between two looks at a running child (memory, cancellation). The exit itself is not
# polled: it wakes the wait at once.
FIRST_LOOK_S = 0.005
LONGEST_LOOK_S = 0.25

# Used where util-linux's setpriv is missing: the same request to the kernel, then the program itself.
_PDEATHSIG_CODE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)

_warden = Warden()
_parent_pid: int | None = None
_drives_build = False
_cancelled = threading.Event()
_cancel_lock = threading.Lock()
_cancel_reason = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one run of a program cost.

    Attributes:
      wall_s: seconds from start to exit.
      cpu_s: user plus system seconds, all threads and children.
      max_rss_bytes: largest resident memory of the program or of one that it started, whichever is larger,
        sampled at least every 0.25 s. The kernel's own ``ru_maxrss`` is no use here: a child inherits the
        size of the Python process that forked it.
      bytes_read: bytes it asked the system for, from disk or from its cache; pages of a mapped file are not
        among them. 0 where the kernel does not count.
      bytes_from_disk: bytes that storage really delivered for it, mapped files among them.
      energy_j: joules of the processor's packages, an estimate (`programs.energy` states the
        rule); None where the machine does not tell, and in receipts of older versions.
    """

    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    bytes_read: int = 0
    bytes_from_disk: int = 0
    energy_j: float | None = None


def sum_usages(usages: Sequence[Usage]) -> Usage:
    """Returns what several runs cost, one after the other; energy only where each of them knows its own."""
    joules = [usage.energy_j for usage in usages if usage.energy_j is not None]
    return Usage(
        wall_s=sum(usage.wall_s for usage in usages),
        cpu_s=sum(usage.cpu_s for usage in usages),
        max_rss_bytes=max(usage.max_rss_bytes for usage in usages),
        bytes_read=sum(usage.bytes_read for usage in usages),
        bytes_from_disk=sum(usage.bytes_from_disk for usage in usages),
        energy_j=sum(joules) if len(joules) == len(usages) else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """How a program ended.

    Attributes:
      exit_code: 0 to 255, or minus the number of the signal that killed it.
      stdout_tail: the last `TAIL_BYTES` it printed.
      stderr_tail: the last `TAIL_BYTES` of its messages.
      usage: what it cost.
    """

    exit_code: int
    stdout_tail: str
    stderr_tail: str
    usage: Usage


def cancel_all(reason: str = "the run was stopped") -> None:
    """Kills every program of this process and refuses new ones until `allow_all`; the first reason stays."""
    global _cancel_reason
    with _cancel_lock:
        if not _cancelled.is_set():
            _cancel_reason = reason
            _cancelled.set()


def raise_if_cancelled(what: str) -> None:
    """Raises once `cancel_all` was called; for work of our own that stands beside programs.

    Raises:
      CancelledError: it was; says that ``what`` was stopped.
    """
    if _cancelled.is_set():
        raise CancelledError(f"{what} was stopped: {_cancel_reason}")


def allow_all() -> None:
    """Allows programs again after `cancel_all`."""
    _cancelled.clear()


def drive_build() -> None:
    """Says that this process submits builds: it may outlive its parent, e.g. a shell that the user left."""
    global _drives_build
    _drives_build = True


def follow_parent() -> None:
    """Makes programs of this process end when its parent does; for workers that an engine started.

    An engine that gives up a job, or an executor that is killed, leaves Python workers behind that wait
    for their search, hours perhaps, for nobody. No effect in a process that submits builds.
    """
    global _parent_pid
    if not _drives_build and _parent_pid is None:
        _parent_pid = os.getppid()


def _is_abandoned() -> bool:
    if _parent_pid is None:
        return False
    # A worker's main thread ends when the engine closes its connection; other threads are then waited for.
    return os.getppid() != _parent_pid or not threading.main_thread().is_alive()


def launcher() -> list[str]:
    """Returns the words before a command line that make the kernel kill it when its starter dies.

    Python's own ``preexec_fn`` could ask for the same, but forks a threaded process to run Python code in it,
    which may deadlock; a tiny program in between cannot.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is not None:
        return [setpriv, "--pdeathsig", "KILL", "--"]
    return [sys.executable, "-I", "-S", "-c", _PDEATHSIG_CODE]


def run_program(argv: Sequence[str], *, folder: Path, timeout_s: float) -> Completed:
    """Runs a program in a folder and waits for its end.

    Args:
      argv: absolute path of the program and its arguments; no shell is involved.
      folder: working directory; receives ``stdout.log`` and ``stderr.log``.
      timeout_s: after so many seconds the whole process group is killed.
    Raises:
      ToolTimeoutError: it ran too long.
      CancelledError: `cancel_all` was called.
      StorageFullError: no space for its output files.
    """
    name = Path(argv[0]).name
    started, meter = time.monotonic(), EnergyMeter()
    process = _start(argv, name, folder, "stdout.log", "stderr.log")
    try:
        peak_bytes = _watch(process.pid, name, started, timeout_s, meter)
        num_read = _bytes_read(process.pid)
    finally:
        cpu_s = _end(process)
    return Completed(
        exit_code=process.returncode,
        stdout_tail=_tail(folder / "stdout.log"),
        stderr_tail=_tail(folder / "stderr.log"),
        usage=_usage(started, cpu_s, peak_bytes, num_read, meter),
    )


class Running:
    """A program that runs beside this thread, from `running`.

    Attributes:
      pid: of the process.
      usage: what it cost, once it is ended; None before.
    """

    def __init__(self, pid: int, name: str, folder: Path) -> None:
        self.pid = pid
        self._name, self._folder = name, folder
        self.usage: Usage | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself."""
        return self._ended() is not None

    def _ended(self) -> os.waitid_result | None:
        # It stays unreaped, so that its group number is nobody else's when the group is killed.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def check(self) -> None:
        """Returns while it runs and is wanted.

        Raises:
          CancelledError: `cancel_all` was called, or the engine of this worker is gone.
          ToolFailedError: it ended.
        """
        if _is_abandoned():
            cancel_all("the engine that started this worker is gone")
        raise_if_cancelled(self._name)
        ended = self._ended()
        if ended is not None:
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            raise ToolFailedError(self._name, code, self.said())

    def said(self) -> str:
        """Returns the end of what it printed."""
        return _tail(self._folder / f"{self._name}.err") or _tail(self._folder / f"{self._name}.out")


@contextlib.contextmanager
def running(argv: Sequence[str], *, folder: Path, name: str) -> Iterator[Running]:
    """Runs a program beside this thread, and ends it with its process group whatever happens.

    It dies with this thread, as programs of `run_program` do.

    Args:
      argv: absolute path of the program and its arguments.
      folder: working directory; receives ``NAME.out`` and ``NAME.err``.
      name: of the program, for files and errors.
    Raises:
      CancelledError: `cancel_all` was called before.
      StorageFullError: no space for its output files.
    """
    started, meter = time.monotonic(), EnergyMeter()
    process = _start(argv, name, folder, f"{name}.out", f"{name}.err")
    program = Running(process.pid, name, folder)
    try:
        yield program
    finally:
        peak_bytes, num_read = _peak_bytes(process.pid), _bytes_read(process.pid)
        program.usage = _usage(started, _end(process), peak_bytes, num_read, meter)


def _end(process: subprocess.Popen[bytes]) -> float:
    """Ends a program with its group; returns the CPU seconds that it took."""
    status, used = _reap(process.pid)
    # Popen must not wait for a child that is gone.
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def _usage(
    started: float, cpu_s: float, peak_bytes: int, num_read: tuple[int, int], meter: EnergyMeter
) -> Usage:
    return Usage(
        wall_s=time.monotonic() - started,
        cpu_s=cpu_s,
        max_rss_bytes=peak_bytes,
        bytes_read=num_read[0],
        bytes_from_disk=num_read[1],
        energy_j=meter.joules(cpu_s),
    )


def _start(argv: Sequence[str], name: str, folder: Path, out: str, err: str) -> subprocess.Popen[bytes]:
    if _cancelled.is_set():
        raise CancelledError(f"{name} was not started: {_cancel_reason}")
    with (
        disk_full_is_typed(folder),
        (folder / out).open("wb") as stdout,
        (folder / err).open("wb") as stderr,
    ):
        return subprocess.Popen(
            [*launcher(), *argv],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            start_new_session=True,
            env=_warden.environment(),
        )


def require_success(name: str, done: Completed, folder: Path) -> None:
    """Returns if a program ended with exit code 0.

    Raises:
      StorageFullError: it failed, and there is no space left in its folder: a fault of the machine, not of
        the query, that the next search would meet again.
      ToolFailedError: it failed.
    """
    if done.exit_code == 0:
        return
    if shutil.disk_usage(folder).free < NEARLY_FULL_BYTES:
        raise StorageFullError(str(folder))
    raise ToolFailedError(name, done.exit_code, done.stderr_tail or done.stdout_tail)


def _watch(pid: int, name: str, started: float, timeout_s: float, meter: EnergyMeter) -> int:
    """Waits until a child has exited and returns its peak resident bytes; it stays unreaped."""
    handle = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        look_s, peak_bytes = FIRST_LOOK_S, 0
        while True:
            peak_bytes = max(peak_bytes, _peak_bytes(pid))
            meter.look()
            left_s = started + timeout_s - time.monotonic()
            if poller.poll(max(0.0, min(look_s, left_s)) * 1000):
                return peak_bytes
            if _is_abandoned():
                cancel_all("the engine that started this worker is gone")
            if _cancelled.is_set():
                raise CancelledError(f"{name} was killed: {_cancel_reason}")
            if left_s <= look_s and time.monotonic() >= started + timeout_s:
                raise ToolTimeoutError(name, timeout_s)
            look_s = min(2 * look_s, LONGEST_LOOK_S)
    finally:
        os.close(handle)


def _peak_bytes(pid: int) -> int:
    """Returns the largest VmHWM of a live process and of those it started, 0 for one that has exited.

    A program may be a script around those that do the work, as ``mmseqs search`` is.
    """
    peak_bytes, children = 0, b""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    peak_bytes = int(line.split()[1]) * 1024
        # Absent in kernels without CONFIG_PROC_CHILDREN.
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            children = file.read()
    return max(peak_bytes, *(_peak_bytes(int(child)) for child in children.split()), 0)


def _bytes_read(pid: int) -> tuple[int, int]:
    """Returns what an exited child and its children read; the kernel keeps the sums until it is reaped."""
    counts: dict[bytes, int] = {}
    # Missing in kernels without accounting, denied in some containers.
    with contextlib.suppress(FileNotFoundError, PermissionError), open(f"/proc/{pid}/io", "rb") as file:
        counts = {key: int(value) for key, _, value in (line.partition(b":") for line in file)}
    return counts.get(b"rchar", 0), counts.get(b"read_bytes", 0)


def _reap(pid: int) -> tuple[int, resource.struct_rusage]:
    """Kills what is left of a child's group and collects the child.

    The order matters: an unreaped leader keeps its group number reserved, so the signal cannot reach a
    stranger who got the same number.
    """
    # ProcessLookupError: the leader is a zombie and alone.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").strip()
