"""A warden: a small process that kills what is left of a worker's tools when the worker is gone.

Owns one helper per worker process. It waits for the end of a pipe that only the worker holds, which comes
however the worker dies, SIGKILL among the ways; then it kills every process that carries the worker's mark
in its environment. The kernel's parent-death signal (`programs.subprocess_runner`) reaches the
program itself only, not what it started, and not a program that starts in the moment in which its worker
dies. Invariant: the helper runs before the first program does.

Safe from any thread; a forked child gets a warden and a mark of its own.
"""

from __future__ import annotations

import os
import sys
import threading
import uuid

VARIABLE = "FOLDFEED_WORKER"

# In isolated mode and without site: 10 ms and 6 MB. Looks again for two seconds, because a program may be
# between fork and exec at the first look; a look reads a file of every process here.
_CODE = """
import os, sys, time
mark = sys.argv[1].encode()
sys.stdin.buffer.read()
for pause in (0.1, 0.1, 0.2, 0.4, 0.6, 0.6):
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/environ", "rb") as file:
                    if mark in file.read().split(b"\\0"):
                        os.kill(int(name), 9)
            except OSError:
                pass
    time.sleep(pause)
"""


class Warden:
    """The helper of this process; it is started with the first program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._pid = 0
        self._pipe = -1
        self._mark = ""

    def environment(self) -> dict[str, str]:
        """Returns the environment for a program that must not outlive this process; children inherit it."""
        with self._lock:
            if self._owner != os.getpid():
                self._owner, self._mark = os.getpid(), f"{os.getpid()}-{uuid.uuid4().hex}"
                self._start()
            elif not self._is_alive():
                os.close(self._pipe)
                self._start()
            return {**os.environ, VARIABLE: self._mark}

    def _is_alive(self) -> bool:
        """Returns False when somebody killed the warden."""
        try:
            return os.waitpid(self._pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:
            # Collected by somebody else, or by nobody where the process ignores SIGCHLD.
            return False

    def _start(self) -> None:
        reading, self._pipe = os.pipe()
        try:
            # Not subprocess: its object would warn about a helper that is meant to outlive it.
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", _CODE, f"{VARIABLE}={self._mark}"],
                # Not the mark, which would make it kill itself.
                {name: value for name, value in os.environ.items() if name != VARIABLE},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, reading, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                # Ctrl-C in a terminal must not reach it.
                setsid=True,
            )
        finally:
            os.close(reading)
