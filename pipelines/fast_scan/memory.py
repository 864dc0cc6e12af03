"""What of the fast scan's databases stays in memory, and how searches that run together share one reading.

Owns the room that databases may take and who reads a chunk. Does not own what a chunk is
(`fast_scan.database`). Databases stay in memory, once per process, up to a share of this machine's: those
used last. A larger one is read in passes that its searches share: whoever comes takes the chunk that is there
and goes on from it in a circle, so that some searches at a time parse the file about once instead of once
each. Invariants: every reader gets every chunk once; beside what stays, each reader holds one chunk at most,
and one more is being read.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from foldfeed.pipelines.fast_scan.kernels import Chunk

# All that stay in memory together. Codes and padding are about the file's size.
RESIDENT_SHARE = 0.25


class ChunkedFile(Protocol):
    """A file that is read in chunks; hashable, equal to itself alone."""

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        ...

    def read_chunk(self, start: int) -> Chunk:
        """Returns the chunk that starts at a byte."""
        ...


class Passes:
    """The readings of one database; safe from any thread."""

    def __init__(self, database: ChunkedFile) -> None:
        self._database = database
        self._lock = threading.Lock()
        # Where the chunks start, as far as they are known; the last is the file's end once it was reached.
        self._starts = [0]
        self._counts: dict[int, int] = {}
        self._kept: dict[int, Chunk] = {}
        self._readers = 0
        self._shown: tuple[int, Chunk] | None = None

    @property
    def num_records(self) -> int | None:
        """Records of the whole database; None before its end was reached."""
        ended = self._starts[-1] == self._database.num_bytes
        return sum(self._counts.values()) if ended else None

    @property
    def num_kept(self) -> int:
        """Chunks that are in memory to stay."""
        return len(self._kept)

    def chunks(self) -> Iterator[Chunk]:
        """Yields every chunk once; see `fast_scan.database`."""
        stays = _RESIDENT.admit(self._database, self)
        with self._lock:
            self._readers += 1
        try:
            seen: set[int] = set()
            while (found := self._next(seen, stays)) is not None:
                number, chunk = found
                seen.add(number)
                yield chunk
                # Not held while the next one is read.
                del found, chunk
        finally:
            with self._lock:
                self._readers -= 1
                if not self._readers:
                    self._shown = None
            if stays:
                _RESIDENT.release(self._database)

    def forget(self) -> None:
        """Lets go of what is in memory."""
        self._kept = {}

    def _next(self, seen: set[int], stays: bool) -> tuple[int, Chunk] | None:
        with self._lock:
            if self._shown is not None and self._shown[0] not in seen:
                return self._shown
            number = self._number_after(seen)
            if number is None:
                return None
            # The lock is held while a chunk is read: who comes meanwhile wants the same one.
            self._shown = None
            chunk = self._kept.get(number)
            if chunk is None:
                chunk = self._database.read_chunk(self._starts[number])
                self._counts[number] = chunk.num_records
                if number + 1 == len(self._starts):
                    self._starts.append(int(chunk.starts[-1]))
                if stays:
                    self._kept[number] = chunk
            self._shown = (number, chunk)
            return self._shown

    def _number_after(self, seen: set[int]) -> int | None:
        """Returns the chunk to take when the one that is there was seen; the circle goes on behind it."""
        ended = self._starts[-1] == self._database.num_bytes
        known = len(self._starts) - ended
        current = self._shown[0] if self._shown is not None else -1
        missing = [number for number in range(known) if number not in seen]
        return min(missing, key=lambda number: (number <= current, number), default=None)


class _Resident:
    """The databases in memory, those used last at the end, and how many read each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[ChunkedFile, int] = {}
        self._passes: dict[ChunkedFile, Passes] = {}
        self._readers: collections.Counter[ChunkedFile] = collections.Counter()

    def admit(self, database: ChunkedFile, passes: Passes) -> bool:
        """Makes room for a database before it is read, and counts a reader; False where there is none.

        Databases that nobody reads just now go first. Room is taken before the file is read, so that threads
        that begin together do not pass the limit together.
        """
        with self._lock:
            size = self._bytes.pop(database, None) or database.num_bytes
            limit = limit_bytes()
            for idle in [one for one in self._bytes if not self._readers[one]]:
                if sum(self._bytes.values()) + size <= limit:
                    break
                del self._bytes[idle]
                self._passes.pop(idle).forget()
            if sum(self._bytes.values()) + size > limit:
                return False
            self._bytes[database] = size
            self._passes[database] = passes
            self._readers[database] += 1
            return True

    def release(self, database: ChunkedFile) -> None:
        """Counts a reader less."""
        with self._lock:
            self._readers[database] -= 1
            if not self._readers[database]:
                del self._readers[database]


_RESIDENT = _Resident()


def limit_bytes() -> float:
    """Returns how much of this machine's memory databases may take together."""
    return RESIDENT_SHARE * _memory_bytes()


def describe_room(paths: Sequence[str]) -> str:
    """Returns what a person should know of databases that do not stay in memory; "" where they do."""
    size, limit = sum(map(os.path.getsize, paths)), limit_bytes()
    if size <= limit:
        return ""
    return (
        f"; its {size / 1e9:.3g} GB do not stay in memory here ({limit / 1e9:.3g} GB of this machine's may "
        "be used), so its files are read again, once for the searches that run together"
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
