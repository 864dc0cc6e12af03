"""`PieceNote`: what a reading process says about a piece, some samples that it packed together.

A piece is rows of a header and samples (`reading.packed`) in a stretch of shared memory. The note
travels beside it (`wire`) as bytes: numbers, and a JSON text of further facts that few have use for, so it is
parsed by who has. No pointers and no pickles. Pure functions.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

# Start, size, samples, bytes of them, sizes of what was read (three), when.
_HEAD = struct.Struct("<QQIQ3Qd")
# Stands in a piece for a sample that is not in it after all: it could not be read there.
MISSING = -1


class PieceNote(NamedTuple):
    """One piece.

    Attributes:
      start: its first byte: of its rows, whose places are counted from here.
      size: its bytes.
      numbers: of its samples, one for each row; `MISSING` for those that are not there.
      read_s: seconds that planning and reading took, one for each row; 0 for those that are not there.
      num_bytes: of the arrays of all of them.
      sizes: ``stored_bytes``, ``decoded_bytes`` and ``used_bytes`` of all of them, see
        `reading.fetch.Fetched`.
      now: when the note was written.
      facts: a JSON object; ``times`` and ``spans`` for `meters.meters.Meters.heard`, ``counters`` of
        the cache, and ``substitution`` where the one sample is made from another record.
    """

    start: int
    size: int
    numbers: list[int]
    read_s: list[float]
    num_bytes: int
    sizes: tuple[int, int, int]
    now: float
    facts: bytes

    def pack(self) -> bytes:
        """Returns the note as bytes."""
        head = _HEAD.pack(self.start, self.size, len(self.numbers), self.num_bytes, *self.sizes, self.now)
        numbers, read_s = np.array(self.numbers, dtype="<i8"), np.array(self.read_s, dtype="<f8")
        return b"".join((head, numbers.tobytes(), read_s.tobytes(), self.facts))

    @classmethod
    def unpack(cls, data: bytes) -> PieceNote:
        """Returns the note that `pack` made bytes of."""
        start, size, count, num_bytes, stored, decoded, used, now = _HEAD.unpack_from(data)
        body = struct.unpack_from(f"<{count}q{count}d", data, _HEAD.size)
        facts = data[_HEAD.size + 16 * count :]
        sizes = (stored, decoded, used)
        return cls(start, size, list(body[:count]), list(body[count:]), num_bytes, sizes, now, facts)
