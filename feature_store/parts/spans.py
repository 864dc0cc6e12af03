"""Where the entries of some records of a part lie on the first axis of its arrays.

Pure arithmetic that scans of many records share: which records can be read in one go, and whose an entry is.
Entries of records that are not among them (deleted ones, or ones that nobody asked for) lie in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def by_part(index: pa.Table, columns: Sequence[str], order: str) -> Iterator[tuple[str, pa.Table]]:
    """Yields each part of some records, by part id, and their index rows.

    Args:
      index: rows of the index.
      columns: what to give of them; ``part_id`` and ``order`` come along.
      order: the column that sorts them within a part: where a record starts, for a scan.
    """
    if not len(index):
        return
    names = list(dict.fromkeys(["part_id", order, *columns]))
    index = index.select(names).sort_by([("part_id", "ascending"), (order, "ascending")])
    counts = pc.value_counts(index["part_id"].combine_chunks())
    start = 0
    # Counted in order of first appearance, and equal ids are neighbours.
    for part_id, count in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
        yield part_id, index.slice(start, count).combine_chunks()
        start += count


class Spans:
    """The entries of records, sorted by where they start.

    Attributes:
      first: int64 (records,), first entry of each.
      size: int64 (records,), number of entries.
    """

    def __init__(self, first: NDArray[np.int64], size: NDArray[np.int64]) -> None:
        self.first = first
        self.size = size

    def runs(self, max_gap: int) -> list[tuple[int, int]]:
        """Returns ranges of records that lie together, but for gaps of so many entries."""
        gaps = self.first[1:] - (self.first[:-1] + self.size[:-1])
        cuts = (np.flatnonzero(gaps > max_gap) + 1).tolist()
        return list(zip([0, *cuts], [*cuts, len(self.first)], strict=True))

    def bounds(self, low: int, high: int) -> tuple[int, int]:
        """Returns the first entry of records ``[low, high)`` and the end of the last."""
        return int(self.first[low]), int(self.first[high - 1] + self.size[high - 1])

    def owners(
        self, low: int, high: int, start: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the record of each entry in ``[start, end)`` that belongs to one of ours, and the entry.

        Args:
          low: of the range of records to look at.
          high: its end.
          start: first entry; not before that of record ``low``.
          end: end of the entries.
        """
        entry = np.arange(start, end, dtype=np.int64)
        owner = np.searchsorted(self.first[low:high], entry, side="right") - 1 + low
        ours = entry < self.first[owner] + self.size[owner]
        return owner[ours], entry[ours]
