"""Open local files for random reads, with a bounded number of descriptors.

A store of a thousand parts has fifteen thousand shard files, and a process often may open 1,024. Owns the
descriptors of all local shard files of this process and closes those that were not read lately; the next read
opens the file again.

Thread safe: a descriptor is closed when nobody reads through it any more, because every read holds a
reference to its handle. A fork shares descriptors harmlessly: every read carries its own offset.
"""

from __future__ import annotations

import collections
import os
import resource
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

# However many descriptors a process may have, more than this buys nothing.
MAX_OPEN_FILES = 4096


class _Handle:
    """A descriptor that is closed with its last reference."""

    __slots__ = ("number",)

    def __init__(self, path: str | Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound above, because modules lose their names before the interpreter ends. The attribute is missing
        # when the file could not be opened.
        if hasattr(self, "number"):
            close(self.number)


class LocalFile:
    """One file; ``file(start, size)`` returns up to ``size`` bytes from ``start``."""

    def __init__(self, path: Path) -> None:
        """Opens the file; FileNotFoundError when there is none."""
        self.was_read = False
        self._path = path
        self._handle: _Handle | None = _Handle(path)
        _open_files.admit(self)

    def __call__(self, start: int, size: int) -> bytes:
        """Returns bytes of the file, fewer than asked for only at its end."""
        self.was_read = True
        # The name holds the handle until the read is over. Without it only the number would be left, and
        # another thread could close it and open another file under it meanwhile.
        handle = self._handle or self._reopen()
        return os.pread(handle.number, size, start)

    def release(self) -> None:
        """Gives the descriptor back; the next read opens the file again."""
        self._handle = None

    def _reopen(self) -> _Handle:
        handle = self._handle = _Handle(self._path)
        _open_files.admit(self)
        return handle


class _OpenFiles:
    """All files with a descriptor; of too many, those are closed that were not read since the last look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: collections.deque[weakref.ref[LocalFile]] = collections.deque()

    def admit(self, file: LocalFile) -> None:
        """Takes a file that has just been opened."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Half of what the process may have is for others.
        limit = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, soft // 2)
        with self._lock:
            self._files.append(weakref.ref(file))
            while len(self._files) > limit:
                reference = self._files.popleft()
                old = reference()
                if old is None:
                    continue
                if old is file or old.was_read:
                    old.was_read = False
                    self._files.append(reference)
                else:
                    old.release()


_open_files = _OpenFiles()
# A fork may happen while another thread holds the lock; the child gets one of its own.
os.register_at_fork(after_in_child=lambda: setattr(_open_files, "_lock", threading.Lock()))
