"""Writes one sharded Zarr v3 array as one file, chunk by chunk, in bounded memory.

zarr-python rewrites a whole shard for every region that is written, and its bytes depend on the order of the
calls. A part is written once, front to back, so this writer appends encoded chunks and closes with the index:
memory is one chunk plus 16 bytes per chunk, and equal content gives equal bytes.

A chunk that holds nothing but the fill value is not stored; its index entry says so (2^64 - 1, 2^64 - 1).
Most tiles of deletions are such chunks.

Source: Zarr sharding codec v1.0, "Binary shard format".
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard

from foldfeed.feature_store.format.schema import ZSTD_LEVEL, ArraySpec, fill_chunk

MISSING = 0xFFFF_FFFF_FFFF_FFFF


class ShardWriter:
    """Appends entries along the first axis of one array.

    Not thread safe: one writer belongs to one thread.
    """

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        self.spec = spec
        self.length = 0
        self._fill = fill_chunk(spec)
        self._fill_bytes = self._fill.tobytes()
        self._chunk = self._fill.copy()
        self._used = 0
        self._index: list[tuple[int, int]] = []
        self._offset = 0
        self._digest = hashlib.sha256()
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False)
        self._path = folder / spec.shard_path
        self._path.parent.mkdir(parents=True)
        # Unbuffered: a buffer that a full disk refused would fail a second time when the file is closed.
        self._file = self._path.open("xb", buffering=0)

    def append(self, values: np.ndarray) -> None:
        """Adds entries.

        Args:
          values: (n, *chunk[1:]) of the array's dtype.
        """
        assert values.shape[1:] == self.spec.chunk[1:], (self.spec.name, values.shape)
        assert values.dtype == np.dtype(self.spec.dtype), (self.spec.name, values.dtype)
        capacity = self.spec.chunk[0]
        taken = 0
        while taken < len(values):
            step = min(capacity - self._used, len(values) - taken)
            self._chunk[self._used : self._used + step] = values[taken : taken + step]
            self._used += step
            taken += step
            if self._used == capacity:
                self._flush()
        self.length += len(values)

    def close(self) -> dict[str, dict[str, Any]]:
        """Writes the index and the metadata; returns size and sha256 of the files of this array by path."""
        if self._used:
            self._flush()
        files = {}
        if self._index:
            index = np.asarray(self._index, dtype="<u8").tobytes()
            self._write(index + google_crc32c.value(index).to_bytes(4, "little"))
            files[self.spec.shard_path] = {"bytes": self._offset, "sha256": self._digest.hexdigest()}
        self._file.close()
        if not self._index:
            # An array without a single stored chunk has no shard object: that is how Zarr spells "all fill".
            self._path.unlink()
        metadata = self.spec.metadata(self.length)
        path = f"{self.spec.name}/zarr.json"
        self._path.parents[len(self.spec.chunk)].joinpath("zarr.json").write_bytes(metadata)
        files[path] = {"bytes": len(metadata), "sha256": hashlib.sha256(metadata).hexdigest()}
        return files

    def abort(self) -> None:
        """Closes the file without finishing it; the caller throws the folder away."""
        self._file.close()

    def _flush(self) -> None:
        raw = self._chunk.tobytes()
        if raw == self._fill_bytes:
            self._index.append((MISSING, MISSING))
        else:
            encoded = self._compressor.compress(raw)
            encoded += google_crc32c.value(encoded).to_bytes(4, "little")
            self._index.append((self._offset, len(encoded)))
            self._write(encoded)
        self._chunk[:] = self._fill
        self._used = 0

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            # A raw write may stop short when the disk fills up; the next one then says why.
            rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self._offset += len(data)
