"""Names of searches by the million in little memory: sorted records in a temporary file, a 256th at a time.

Owns the sorting of records of one length (`Sorter`) and the set of sha256 digests that it gives (`IdSet`).
Does not own what the digests name. Records begin with a digest, so their first byte divides them evenly.
Memory: the records that wait for the next run (`MAX_WAITING`), and a 256th of all while they are read. The
temporary files have no name and end with the process, however it ends. Not safe from several threads at once.
"""

from __future__ import annotations

import bisect
import hashlib
import tempfile
import weakref
from array import array
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate, pairwise
from typing import IO

from foldfeed.feature_store.storage import disk_full_is_typed

NUM_BUCKETS = 256
DIGEST_BYTES = 32

# Records that are sorted at once: 5 to 15 MB of Python objects.
MAX_WAITING = 1 << 16
# Sets up to this size stay in memory.
MAX_IN_MEMORY_BYTES = 1 << 20


class Sorter:
    """Records of one length, brought in any order and read sorted."""

    def __init__(self, record_bytes: int) -> None:
        self._size = record_bytes
        self._waiting: list[bytes] = []
        self._file = _temporary_file(self)
        # Of each run, where its 256 buckets begin in the file, and its end.
        self._runs: list[array[int]] = []
        self._end = 0

    def add(self, record: bytes) -> None:
        """Takes one record."""
        self._waiting.append(record)
        if len(self._waiting) >= MAX_WAITING:
            self._write_run()

    def buckets(self) -> Iterator[list[bytes]]:
        """Yields the sorted records of each first byte; equal ones stand side by side."""
        self._write_run()
        for bucket in range(NUM_BUCKETS):
            records: list[bytes] = []
            for run in self._runs:
                self._file.seek(run[bucket])
                records += _cut(self._file.read(run[bucket + 1] - run[bucket]), self._size)
            records.sort()
            yield records

    def _write_run(self) -> None:
        self._waiting.sort()
        starts = [bisect.bisect_left(self._waiting, bytes([first])) for first in range(NUM_BUCKETS)]
        places = (*starts, len(self._waiting))
        self._runs.append(array("Q", (self._end + self._size * place for place in places)))
        with disk_full_is_typed(tempfile.gettempdir()):
            self._file.seek(self._end)
            self._file.write(b"".join(self._waiting))
        self._end = self._runs[-1][-1]
        self._waiting = []


class IdSet(Collection[str]):
    """Distinct sha256 digests (hex), in order."""

    def __init__(self, sorted_digests: Iterable[bytes] = ()) -> None:
        """Makes the set.

        Args:
          sorted_digests: 32 bytes each; equal ones side by side count once.
        """
        counts = [0] * NUM_BUCKETS
        content = hashlib.sha256()
        self._file = _temporary_file(self)
        last = b""
        with disk_full_is_typed(tempfile.gettempdir()):
            for digest in sorted_digests:
                if digest != last:
                    self._file.write(digest)
                    content.update(digest)
                    counts[digest[0]] += 1
                    last = digest
        self._starts = list(accumulate(counts, initial=0))
        self.content_digest = content.hexdigest()

    @classmethod
    def of(cls, names: Iterable[str]) -> IdSet:
        """Returns the set of some digests (hex)."""
        return cls(sorted(map(bytes.fromhex, names)))

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yields all digests, 32 bytes each, so many at a time; nothing for an empty set."""
        for start in range(0, len(self), size):
            self._file.seek(DIGEST_BYTES * start)
            yield self._file.read(DIGEST_BYTES * min(size, len(self) - start))

    def buckets(self) -> Iterator[tuple[str, list[str]]]:
        """Yields two letters and the digests that begin with them; only letters that some digest has."""
        for bucket, (start, stop) in enumerate(pairwise(self._starts)):
            if stop > start:
                self._file.seek(DIGEST_BYTES * start)
                data = self._file.read(DIGEST_BYTES * (stop - start))
                yield f"{bucket:02x}", [digest.hex() for digest in _cut(data, DIGEST_BYTES)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[str]:
        for _, names in self.buckets():
            yield from names

    def __contains__(self, name: object) -> bool:
        return any(name in names for _, names in self.buckets())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdSet) and self.content_digest == other.content_digest

    def __hash__(self) -> int:
        return hash(self.content_digest)


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def _temporary_file(owner: object) -> IO[bytes]:
    """Returns a file in memory that moves to the disk when it grows; it is closed with its owner."""
    file = tempfile.SpooledTemporaryFile(MAX_IN_MEMORY_BYTES)  # noqa: SIM115 - closed below
    weakref.finalize(owner, file.close)
    return file
