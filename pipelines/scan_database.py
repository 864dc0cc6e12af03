"""A FASTA database as the fast scan wants it: residue codes of many targets side by side, in chunks.

Owns reading FASTA as HMMER reads it, the chunks and what stays in memory. Does not own scores. Invariants: a
record here is a record of HMMER's, with the same residue codes, and the number of records is HMMER's Z (it
counts sequences without residues); the text of a record is copied from the file byte for byte.

Databases stay in memory, once per process, up to a share of this machine's: those used last. A larger one is
read again, chunk by chunk, for every batch of queries.

Source: how Easel reads FASTA (``esl_sqio_ascii.c``) and its amino alphabet (``esl_alphabet.c``).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import mmap
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from foldfeed.pipelines.errors import DatabaseError
from foldfeed.pipelines.scan_kernels import REFUSED, SKIPPED, Blocks, Kernel, best_kernel, digitise, pack

# HMMER's order of residues; a letter's code is its place. Gaps may not be in a FASTA file.
SYMBOLS = "ACDEFGHIKLMNPQRSTVWY-BJZOUX*~"
_NOT_IN_FASTA = "-~"

# Text that becomes one chunk; a chunk is searched whole, and only one at a time is made.
CHUNK_BYTES = 256 << 20
# All that stay in memory together. Codes and padding are about the file's size.
RESIDENT_SHARE = 0.25

_FAULT_TEXTS = {
    "start": "text before the first '>'",
    "name": "a header without a name",
    "residue": "a character that is no residue",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of a database, packed for one kernel.

    Attributes:
      starts: int64 (records + 1,), where the records start in the file; the last is where the chunk ends.
      order: int64 (records,), record of each lane, by length.
      lengths: int64 (records,), residues of each lane.
      blocks: the lanes.
    """

    starts: NDArray[np.int64]
    order: NDArray[np.int64]
    lengths: NDArray[np.int64]
    blocks: Blocks

    @property
    def num_records(self) -> int:
        """Records, those without residues counted."""
        return len(self.order)

    @property
    def num_residues(self) -> int:
        """Residues of all records."""
        return int(self.lengths.sum())


def codes_of_bytes() -> NDArray[np.uint8]:
    """Returns uint8 (256,): what a byte of a sequence becomes, a code, skipped, or refused."""
    table = np.full(256, REFUSED, dtype=np.uint8)
    for code, letter in enumerate(SYMBOLS):
        if letter not in _NOT_IN_FASTA:
            table[[ord(letter), ord(letter.lower())]] = code
    table[list(b" \t\r\n")] = SKIPPED
    return table


class ScanDatabase:
    """A FASTA file that stays unchanged while it is searched; safe from any thread."""

    def __init__(self, path: str, kernel: Kernel, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path = path
        self.kernel = kernel
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._kept: tuple[Chunk, ...] | None = None
        self._num_records: int | None = None

    @property
    def num_records(self) -> int:
        """HMMER's Z. Reads the file where it was not read yet.

        Raises:
          DatabaseError: see `chunks`.
        """
        if self._num_records is None:
            for _ in self.chunks():
                pass
        assert self._num_records is not None, "chunks() sets it at its end"
        return self._num_records

    def chunks(self) -> Iterator[Chunk]:
        """Yields the chunks in the file's order; keeps them where the database is small enough.

        Raises:
          DatabaseError: text that HMMER would refuse: what, and at which byte.
        """
        if not _RESIDENT.admit(self):
            yield from self._read()
            return
        try:
            with self._lock:
                if self._kept is None:
                    self._kept = tuple(self._read())
                kept = self._kept
            yield from kept
        finally:
            _RESIDENT.release(self)

    def forget(self) -> None:
        """Lets go of what is in memory."""
        self._kept = None

    def copy_records(self, chunk: Chunk, records: NDArray[np.int64], out: BinaryIO) -> None:
        """Writes the text of records of a chunk, byte for byte.

        Args:
          chunk: of this database.
          records: int64 (chosen,), places in the chunk, ascending.
          out: open for writing.
        """
        with open(self.path, "rb") as file:
            for record in records:
                start, end = int(chunk.starts[record]), int(chunk.starts[record + 1])
                file.seek(start)
                text = file.read(end - start)
                out.write(text if text.endswith(b"\n") else text + b"\n")

    def _read(self) -> Iterator[Chunk]:
        num_records = 0
        table = codes_of_bytes()
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = 0
            while start < len(text):
                end = _end_of_chunk(text, start + self._chunk_bytes)
                chunk = self._chunk(text[start:end], start, table)
                num_records += chunk.num_records
                yield chunk
                start = end
        self._num_records = num_records

    def _chunk(self, text: bytes, offset: int, table: NDArray[np.uint8]) -> Chunk:
        try:
            codes, record_starts, code_starts = digitise(np.frombuffer(text, dtype=np.uint8), table)
        except ValueError as error:
            kind, position = error.args
            shown = text[position : position + 1]
            raise DatabaseError(
                os.path.basename(self.path),
                self.path,
                f"{_FAULT_TEXTS[kind]} at byte {offset + position} ({shown!r}); HMMER refuses it too",
            ) from error
        lengths = np.diff(code_starts)
        order = np.argsort(lengths, kind="stable")
        return Chunk(
            starts=record_starts + offset,
            order=order,
            lengths=lengths[order],
            blocks=pack(codes, code_starts, order, self.kernel.lanes),
        )


class _Resident:
    """The databases in memory, those used last at the end, and how many read each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[ScanDatabase, int] = {}
        self._readers: collections.Counter[ScanDatabase] = collections.Counter()

    def admit(self, database: ScanDatabase) -> bool:
        """Makes room for a database before it is read, and counts a reader; False where there is none.

        Databases that nobody reads just now go first. Room is taken before the file is read, so that threads
        that begin together do not pass the limit together.
        """
        with self._lock:
            size = self._bytes.pop(database, None) or os.path.getsize(database.path)
            limit = RESIDENT_SHARE * _memory_bytes()
            for idle in [one for one in self._bytes if not self._readers[one]]:
                if sum(self._bytes.values()) + size <= limit:
                    break
                del self._bytes[idle]
                idle.forget()
            if sum(self._bytes.values()) + size > limit:
                return False
            self._bytes[database] = size
            self._readers[database] += 1
            return True

    def release(self, database: ScanDatabase) -> None:
        """Counts a reader less."""
        with self._lock:
            self._readers[database] -= 1
            if not self._readers[database]:
                del self._readers[database]


_RESIDENT = _Resident()


def _end_of_chunk(text: mmap.mmap, near: int) -> int:
    """Returns where the first record after a place starts, or the end of the file."""
    # A header holds no line feed, so '>' behind one always starts a record.
    found = text.find(b"\n>", near - 1) if near < len(text) else -1
    return len(text) if found < 0 else found + 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.lru_cache(maxsize=1024)
def _database(path: str, size: int, mtime_ns: int, kernel: Kernel) -> ScanDatabase:
    return ScanDatabase(path, kernel)


def open_database(path: str) -> ScanDatabase:
    """Returns the database of a file; the same object while the file's size and time stay.

    Raises:
      ToolNotFoundError: the kernels were not compiled.
    """
    stat = os.stat(path)
    return _database(os.path.realpath(path), stat.st_size, stat.st_mtime_ns, best_kernel())
