"""Random access to one sharded Zarr v3 array: cached index, one read per run of chunks, verified decode.

zarr-python and TensorStore (without a cache pool) read and decode the shard index again on every partial
read. Here it is read once, its checksum is verified once, and 16 bytes per chunk stay in memory.

Two ways lead to a chunk. `ShardReader.chunks` yields chunk after chunk, simply; `ShardReader.runs`, `fetch`
and `decode` are its steps one by one, so that whoever has many chunks to read may choose order and threads.
They must agree (a test).

Invariants: every chunk's crc32c is verified on every read, and a decoded chunk has exactly the size the
schema says, so a flipped or missing byte is an error and never a value. Thread safe: the index is immutable
once loaded (two threads that race load the same bytes), reads carry their own offsets, decompressors are per
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.format.schema import ArraySpec
from foldfeed.feature_store.parts.presence import missing_file
from foldfeed.feature_store.parts.shard_writer import MISSING
from foldfeed.feature_store.storage import Blobs, RangeReader

CRC_BYTES = 4
# Chunks that lie this close together are fetched by one read; the gap is thrown away.
MAX_GAP_BYTES = 16 << 10
MAX_READ_BYTES = 32 << 20


class _Codec(threading.local):
    """zstd's decompressor of each thread, made when the thread first needs it."""

    def __init__(self) -> None:
        self.decompress = zstandard.ZstdDecompressor().decompress


_codec = _Codec()


class ReadRun(NamedTuple):
    """Chunks that one read brings.

    Attributes:
      start: first byte in the shard.
      end: last byte + 1.
      entries: (place in the list asked for, chunk number, first byte in the run, bytes) of each chunk.
    """

    start: int
    end: int
    entries: list[tuple[int, int, int, int]]


class FileRange(NamedTuple):
    """A stretch of a file of the store.

    Attributes:
      path: relative to the store's root.
      start: first byte.
      size: bytes.
    """

    path: str
    start: int
    size: int


class ShardReader:
    """One array of one part.

    Attributes:
      spec: the array's schema.
      length: entries on the first axis.
      path: of its shard, relative to the store's root.
    """

    def __init__(
        self, blobs: Blobs, part_path: str, spec: ArraySpec, length: int, num_bytes: int | None
    ) -> None:
        """Opens nothing yet.

        Args:
          blobs: the store's files.
          part_path: folder of the part.
          spec: the array.
          length: entries on the first axis, from the part's metadata.
          num_bytes: size of the shard object from the part's metadata; None when nothing is stored.
        """
        self.spec = spec
        self.length = length
        self._blobs = blobs
        self.path = f"{part_path}/{spec.shard_path}"
        self._num_bytes = num_bytes
        self._chunk_bytes = spec.chunk_bytes
        self._dtype = np.dtype(spec.dtype)
        self._entry_shape = spec.chunk[1:]
        self._entry_bytes = spec.chunk_bytes // spec.chunk[0]
        self._opened: tuple[RangeReader, NDArray[np.uint64]] | None = None

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Returns entries ``[start, stop)`` of the first axis.

        Args:
          start: the first.
          stop: behind the last.
          out: an array of that shape and dtype to read into; a fresh one when None.
        Raises:
          CorruptDataError: a checksum, a size or the index does not agree.
        """
        assert 0 <= start <= stop <= self.length, (self.path, start, stop, self.length)
        if out is None:
            out = np.empty((stop - start, *self._entry_shape), dtype=self._dtype)
        if start == stop:
            return out
        size = self.spec.chunk[0]
        first, behind = start // size, -(-stop // size)
        if self._num_bytes is None:
            out[...] = self.spec.fill_value
            return out
        numbers, found = range(first, behind), self._open()[1][first:behind].tolist()
        runs, missing = _runs_of(numbers, found, MAX_READ_BYTES)
        for place in missing:
            low = max(numbers[place] * size - start, 0)
            out[low : (numbers[place] + 1) * size - start] = self.spec.fill_value
        for run in runs:
            data = self.fetch(run)
            for _, number, at, num_bytes in run.entries:
                raw, top = self.decode(number, data, at, num_bytes), number * size
                low, high = max(start, top), min(stop, top + size)
                shape = (high - low, *self._entry_shape)
                # One view of what is wanted of the chunk.
                out[low - start : high - start] = np.ndarray(
                    shape, self._dtype, raw, (low - top) * self._entry_bytes
                )
        return out

    def chunks(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yields (number, decoded chunk) in the order asked for.

        Args:
          numbers: chunk numbers; neighbours on disk that are neighbours here share one read.
        Yields: read-only arrays of the chunk's shape; None for a chunk that holds only the fill value.
        Raises:
          CorruptDataError: a checksum, a size or the index does not agree.
        """
        if self._num_bytes is None:
            yield from ((number, None) for number in numbers)
            return
        index = self._open()[1]
        entries = zip(numbers, index[np.asarray(numbers, dtype=np.int64)].tolist(), strict=True)
        run: list[tuple[int, int, int]] = []
        start = end = 0
        for number, (offset, size) in entries:
            if offset == MISSING:
                # Nothing to read; it travels with the run so that chunks come out in order.
                run.append((number, -1, 0))
                continue
            if end and not (0 <= offset - end <= MAX_GAP_BYTES and offset + size - start <= MAX_READ_BYTES):
                yield from self._read_run(run, start, end)
                run, end = [], 0
            if not end:
                start = offset
            end = offset + size
            run.append((number, offset, size))
        yield from self._read_run(run, start, end)

    def runs(self, numbers: Sequence[int], max_read_bytes: int) -> tuple[list[ReadRun], list[int]]:
        """Returns the reads that bring some chunks; reads nothing but the shard's index, once.

        Args:
          numbers: chunk numbers, ascending for few reads; a number may come several times in a row.
          max_read_bytes: of one read, unless a single chunk is larger.
        Returns: runs, in which every chunk that is stored has an entry for every time it was asked for, and
          the places in ``numbers`` of those that are not stored because they hold only the fill value.
        Raises:
          CorruptDataError: the index is damaged.
        """
        if self._num_bytes is None:
            return [], list(range(len(numbers)))
        index = self._open()[1]
        return _runs_of(numbers, index[np.asarray(numbers, dtype=np.int64)].tolist(), max_read_bytes)

    def fetch(self, run: ReadRun) -> bytes:
        """Returns the bytes of a run.

        Raises:
          CorruptDataError: the file is gone.
        """
        return self._read(run.start, run.end - run.start)

    def decode(self, number: int, data: bytes, at: int, size: int) -> bytes:
        """Returns the bytes of a chunk, in C order of the schema's chunk shape.

        Args:
          number: of the chunk, for messages.
          data: what `fetch` brought.
          at: where the chunk begins in it.
          size: its encoded size.
        Raises:
          CorruptDataError: a checksum or a size does not agree.
        """
        end = at + size - CRC_BYTES
        body = data[at:end]
        if not body or google_crc32c.value(body) != int.from_bytes(data[end : at + size], "little"):
            raise self._damaged(number, "it does not match its crc32c")
        try:
            # The size in the frame is looked at before memory is taken for it.
            if zstandard.frame_content_size(body) != self._chunk_bytes:
                raise self._damaged(number, f"it does not decode to {self._chunk_bytes} bytes")
            return _codec.decompress(body)
        except zstandard.ZstdError as error:
            raise self._damaged(number, f"zstd: {error}") from error

    def bytes_stored(self, numbers: Sequence[int]) -> int:
        """Returns how many bytes of those chunks lie on disk; reads at most the shard's index."""
        if self._num_bytes is None:
            return 0
        _, index = self._open()
        sizes = index[np.asarray(numbers, dtype=np.int64), 1]
        return int(sizes[sizes != MISSING].sum())

    def ranges(self, start: int, stop: int) -> list[FileRange]:
        """Returns what `read` of entries ``[start, stop)`` reads, in as many pieces; reads at most the index.

        Raises:
          CorruptDataError: the index is damaged.
        """
        size = self.spec.chunk[0]
        chunks = range(start // size, -(-stop // size)) if stop > start else range(0)
        runs, _ = self.runs(chunks, MAX_READ_BYTES)
        return [FileRange(self.path, run.start, run.end - run.start) for run in runs]

    def extents(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns where the entries of many ranges begin and end in the file; reads at most the index.

        Args:
          starts: int64 (n,), first entry of each range.
          stops: int64 (n,), end of each.
        Returns: int64 (n,) first bytes and int64 (n,) ends; equal where nothing is stored.
        """
        if self._num_bytes is None or not len(starts):
            return np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
        index = self._open()[1]
        stored = index[:, 0] != MISSING
        # Chunks lie in the order of their numbers; one that is not stored begins and ends with the last.
        ends = np.maximum.accumulate(np.where(stored, index[:, 0] + index[:, 1], 0)).astype(np.int64)
        begins = np.where(stored, index[:, 0].astype(np.int64), np.concatenate([[0], ends[:-1]]))
        size = self.spec.chunk[0]
        first = np.minimum(starts // size, len(index) - 1)
        last = np.clip((stops - 1) // size, first, len(index) - 1)
        return begins[first], np.where(stops > starts, ends[last], begins[first])

    @property
    def is_open(self) -> bool:
        """Whether the index is in memory, or there is none."""
        return self._opened is not None or self._num_bytes is None

    def open(self) -> None:
        """Reads the index unless it is there.

        Raises:
          CorruptDataError: it is damaged or the file is missing.
        """
        if self._num_bytes is not None:
            self._open()

    def _open(self) -> tuple[RangeReader, NDArray[np.uint64]]:
        opened = self._opened
        if opened is None:
            assert self._num_bytes is not None
            try:
                source = self._blobs.open_range(self.path)
                index = self._load_index(source, self._num_bytes)
            except FileNotFoundError as error:
                raise missing_file(self._blobs, self.path) from error
            opened = self._opened = (source, index)
        return opened

    def _load_index(self, source: RangeReader, num_bytes: int) -> NDArray[np.uint64]:
        num_chunks = self.spec.num_chunks(self.length)
        size = 16 * num_chunks + CRC_BYTES
        data = source(num_bytes - size, size) if num_bytes >= size else b""
        if len(data) != size:
            raise CorruptDataError(self.path, f"the shard index is {len(data)} bytes, not {size}")
        if google_crc32c.value(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
            raise CorruptDataError(self.path, "the shard index does not match its crc32c")
        index = np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(num_chunks, 2)
        stored = index[index[:, 0] != MISSING]
        if stored.size and int((stored[:, 0] + stored[:, 1]).max()) > num_bytes - size:
            raise CorruptDataError(self.path, "the shard index points outside the file")
        return index

    def _read(self, start: int, size: int) -> bytes:
        # A file that was open may be gone at a later read: another process collected garbage meanwhile.
        try:
            return self._open()[0](start, size)
        except FileNotFoundError as error:
            raise missing_file(self._blobs, self.path) from error

    def _read_run(
        self, run: list[tuple[int, int, int]], start: int, end: int
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        data = self._read(start, end - start) if end else b""
        for number, offset, size in run:
            if offset < 0:
                yield number, None
            else:
                raw = self.decode(number, data, offset - start, size)
                yield number, np.frombuffer(raw, dtype=self.spec.dtype).reshape(self.spec.chunk)

    def _damaged(self, number: int, reason: str) -> CorruptDataError:
        return CorruptDataError(f"{self.path}, chunk {number}", reason)


def _runs_of(
    numbers: Sequence[int], found: list[tuple[int, int]], max_read_bytes: int
) -> tuple[list[ReadRun], list[int]]:
    """Returns what `ShardReader.runs` does.

    Args:
      numbers: of the chunks.
      found: what the index says of each: first byte and bytes.
      max_read_bytes: of one read.
    """
    runs: list[ReadRun] = []
    missing: list[int] = []
    entries: list[tuple[int, int, int, int]] = []
    start = end = last = 0
    for place, (offset, size) in enumerate(found):
        if offset == MISSING:
            missing.append(place)
            continue
        stop = offset + size
        if entries and not (
            (0 <= offset - end <= MAX_GAP_BYTES and stop - start <= max_read_bytes) or offset == last
        ):
            runs.append(ReadRun(start, end, entries))
            entries = []
        if not entries:
            start = offset
        entries.append((place, numbers[place], offset - start, size))
        last, end = offset, stop
    if entries:
        runs.append(ReadRun(start, end, entries))
    return runs, missing
