"""A FASTA database as engines want it: residue codes, for the fast scan of many targets side by side.

Owns reading FASTA as HMMER reads it and the chunks. Does not own scores, nor what stays in memory and who
reads together (`fast_scan.memory`). Invariants: a record here is a record of HMMER's, with the same residue
codes, and the number of records is HMMER's Z (it counts sequences without residues); the text of a record is
copied from the file byte for byte; a file that is no longer the one that was opened (size, time, inode) is an
error, never a mixture of two files. Files are read, not mapped: a mapped file that somebody cuts kills the
process.

Source: how Easel reads FASTA (``esl_sqio_ascii.c``) and its amino alphabet (``esl_alphabet.c``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from foldfeed.pipelines.errors import DatabaseChangedError, UnreadableDatabaseError
from foldfeed.pipelines.fast_scan import memory as scan_memory
from foldfeed.pipelines.fast_scan.choice import scan_kernel
from foldfeed.pipelines.fast_scan.kernels import REFUSED, SKIPPED, Chunk, DeviceKernel, Kernel, digitise, pack
from foldfeed.pipelines.manifest import file_state as state_of_path
from foldfeed.pipelines.manifest import file_state_of, num_bytes_of

# HMMER's order of residues; a letter's code is its place. Gaps may not be in a FASTA file.
SYMBOLS = "ACDEFGHIKLMNPQRSTVWY-BJZOUX*~"
_NOT_IN_FASTA = "-~"

# Text that becomes one chunk, more where a record is longer; a chunk is searched whole.
CHUNK_BYTES = 64 << 20

_FAULT_TEXTS = {
    "start": "text before the first '>', so it is no FASTA file,",
    "name": "a header without a name, which HMMER refuses too,",
    "residue": "a character that is no residue, which HMMER refuses too,",
}


def codes_of_bytes() -> NDArray[np.uint8]:
    """Returns uint8 (256,): what a byte of a sequence becomes, a code, skipped, or refused."""
    table = np.full(256, REFUSED, dtype=np.uint8)
    for code, letter in enumerate(SYMBOLS):
        if letter not in _NOT_IN_FASTA:
            table[[ord(letter), ord(letter.lower())]] = code
    table[list(b" \t\r\n")] = SKIPPED
    return table


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """Consecutive records of a database, digitised.

    Attributes:
      starts: int64 (records + 1,), where the records start in the file; the last is where they end.
      codes: uint8 (residues,), of one record after the other, without anything between them.
      code_starts: int64 (records + 1,), where a record's codes start.
    """

    starts: NDArray[np.int64]
    codes: NDArray[np.uint8]
    code_starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def extents(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns int64 (records, 2): where records start and end in the file."""
        return np.stack([self.starts[records], self.starts[records + 1]], axis=1)


class ScanDatabase:
    """A FASTA file as it was when this was made; safe from any thread."""

    def __init__(self, path: str, kernel: Kernel | DeviceKernel, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path = path
        self.kernel = kernel
        self._chunk_bytes = chunk_bytes
        self._table = codes_of_bytes()
        self._state = file_state(path)
        self._passes = scan_memory.Passes(self)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return num_bytes_of(self._state)

    @property
    def num_records(self) -> int:
        """HMMER's Z. Reads the file where it was not read yet.

        Raises:
          UnreadableDatabaseError, DatabaseChangedError: see `chunks`.
        """
        if self._passes.num_records is None:
            for _ in self.chunks():
                pass
        assert self._passes.num_records is not None, "a whole pass sets it"
        return self._passes.num_records

    def chunks(self) -> Iterator[Chunk]:
        """Yields every chunk once; in the file's order where nobody else reads with us.

        Raises:
          UnreadableDatabaseError: it holds text that HMMER would refuse: what, and at which byte.
          DatabaseChangedError: the file is gone, is another by now, or cannot be read.
        """
        return self._passes.chunks()

    def records(self) -> Iterator[Records]:
        """Yields the records of every chunk, in the file's order, without keeping any; reads the file.

        Raises:
          UnreadableDatabaseError, DatabaseChangedError: see `chunks`.
        """
        start = 0
        while start < self.num_bytes:
            with self._opened() as file:
                text = self._text(file, start)
            records = self._records(text, start)
            start += len(text)
            yield records

    def forget(self) -> None:
        """Lets go of what is in memory; the next search reads the file again."""
        self._passes.forget()

    def copy_extents(self, extents: NDArray[np.int64], out: BinaryIO) -> None:
        """Writes the text of records, byte for byte; a line end is added to the last where it has none.

        Args:
          extents: int64 (chosen, 2), where they start and end in the file, see `Chunk.extents`.
          out: open for writing.
        Raises:
          DatabaseChangedError: the file is not what it was any more.
        """
        with self._opened() as file:
            for start, end in extents.tolist():
                text = self._read(file, start, end)
                out.write(text if text.endswith(b"\n") else text + b"\n")

    def read_chunk(self, start: int) -> Chunk:
        """Returns the chunk that starts at a byte; it ends where the next does or the file.

        Raises:
          UnreadableDatabaseError, DatabaseChangedError: see `chunks`.
        """
        with self._opened() as file:
            text = self._text(file, start)
        return self._chunk(text, start)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Opens the file, and sees to it that it is the same before and after.

        Raises:
          DatabaseChangedError: it is not, or the system does not give it.
        """
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DatabaseChangedError.unreadable(self.path, error) from error
        try:
            self._require_same(file)
            yield file
            self._require_same(file)
        finally:
            os.close(file)

    def _require_same(self, file: int) -> None:
        if file_state_of(self.path, os.fstat(file)) != self._state:
            raise DatabaseChangedError(self.path, "was changed while it was searched")

    def _unreadable(self, reason: str) -> UnreadableDatabaseError:
        return UnreadableDatabaseError(self.path, reason)

    def _read(self, file: int, start: int, end: int) -> bytes:
        parts = []
        while start < end:
            try:
                part = os.pread(file, end - start, start)
            except OSError as error:
                raise DatabaseChangedError.unreadable(self.path, error) from error
            if not part:
                raise DatabaseChangedError(self.path, f"was cut at byte {start} while it was searched")
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _text(self, file: int, start: int) -> memoryview:
        """Returns whole records from a place on, about a chunk of them."""
        end, text = start, b""
        while end < self.num_bytes:
            more = self._read(file, end, min(end + self._chunk_bytes, self.num_bytes))
            end += len(more)
            text = text + more if text else more
            # A header holds no line feed, so '>' behind one always starts a record.
            cut = text.rfind(b"\n>")
            if end < self.num_bytes and cut >= 0:
                return memoryview(text)[: cut + 1]
        return memoryview(text)

    def _records(self, text: memoryview, offset: int) -> Records:
        try:
            codes, record_starts, code_starts = digitise(np.frombuffer(text, dtype=np.uint8), self._table)
        except ValueError as error:
            kind, position = error.args
            shown = bytes(text[position : position + 1])
            reason = f"{_FAULT_TEXTS[kind]} at byte {offset + position} ({shown!r})"
            raise self._unreadable(reason) from error
        return Records(starts=record_starts + offset, codes=codes, code_starts=code_starts)

    def _chunk(self, text: memoryview, offset: int) -> Chunk:
        records = self._records(text, offset)
        lengths = np.diff(records.code_starts)
        order = np.argsort(lengths, kind="stable")
        return Chunk(
            starts=records.starts,
            order=order,
            lengths=lengths[order],
            distinct_lengths=np.unique(lengths, return_counts=True),
            blocks=pack(records.codes, records.code_starts, order, self.kernel.lanes),
        )


def file_state(path: str) -> str:
    """Returns `foldfeed.pipelines.manifest.file_state` of a file that can be scanned.

    Raises:
      DatabaseChangedError: it is not there.
      UnreadableDatabaseError: it is empty.
    """
    try:
        state = state_of_path(path)
    except OSError as error:
        raise DatabaseChangedError.unreadable(path, error) from error
    if not num_bytes_of(state):
        raise UnreadableDatabaseError(path, "the file is empty")
    return state


@functools.lru_cache(maxsize=1024)
def _database(path: str, state: str, kernel: Kernel | DeviceKernel) -> ScanDatabase:
    return ScanDatabase(path, kernel)


def open_database(path: str) -> ScanDatabase:
    """Returns the database of a file; the same object while the file stays what it is.

    Raises:
      ToolNotFoundError: the kernels were not compiled.
      DeviceError, MissingExtraError: a device is asked for and cannot be used.
      DatabaseChangedError: the file is not there.
      UnreadableDatabaseError: it is empty.
    """
    real = os.path.realpath(path)
    return _database(real, file_state(real), scan_kernel())
