"""A parsed alignment: letters of every row and, sparsely, what the rows have inserted; and its builder.

Of the cells of real alignments some two in a hundred have insertions left of them, so they are kept as a list
until a record needs them as an array: an import then holds what it stores and little more. Owns no syntax
(`a3m`, `stockholm`).
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet

# Rows whose insertions are looked up at once; bounds what a lookup needs besides its result.
_ROWS_AT_ONCE = 1 << 16
_CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SparseDeletions:
    """Deletion counts of an alignment, those that are not zero, row by row.

    Attributes:
      per_row: int32 (num_rows,): how many entries a row has.
      columns: int32 (num_entries,): of each entry, increasing in a row.
      counts: int32 (num_entries,): residues inserted immediately left of the column, at least 1.
    """

    per_row: NDArray[np.int32]
    columns: NDArray[np.int32]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, dense: NDArray[np.int32]) -> SparseDeletions:
        """Returns the counts in an int32 (num_rows, length) array."""
        rows, columns = np.nonzero(dense)
        return cls(
            per_row=np.bincount(rows, minlength=len(dense)).astype(np.int32),
            columns=columns.astype(np.int32),
            counts=dense[rows, columns],
        )

    def take(self, rows: NDArray[np.int64]) -> SparseDeletions:
        """Returns the counts of some rows, in their order."""
        entries, sizes = self._entries(rows)
        return SparseDeletions(
            per_row=sizes.astype(np.int32), columns=self.columns[entries], counts=self.counts[entries]
        )

    def _entries(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns which entries are those of some rows, and how many each row has."""
        sizes = self.per_row[rows].astype(np.int64)
        starts = (np.cumsum(self.per_row, dtype=np.int64) - self.per_row)[rows]
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(starts, sizes) + within, sizes

    def write(self, rows: NDArray[np.int64], out: NDArray[np.int32]) -> None:
        """Writes the counts of some rows.

        Args:
          rows: which, in any order.
          out: int32 (len(rows), length) of zeros.
        """
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            chosen = rows[first : first + _ROWS_AT_ONCE]
            entries, sizes = self._entries(chosen)
            places = np.repeat(np.arange(first, first + len(chosen)), sizes)
            out[places, self.columns[entries]] = self.counts[entries]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParsedAlignment:
    """An alignment in query coordinates.

    The letters are kept next to the codes because AlphaFold 2 de-duplicates rows by their letters, where B
    and D differ, and not by the codes, where they do not.

    Attributes:
      names: the full header of every row, without ``>``.
      letters: uint8 (num_rows, length), ASCII ``A-Z`` and ``-``, the query first.
      sparse: residues inserted immediately left of each column. Insertions right of the last column are
        dropped, as AlphaFold 2 drops them.
      query_insertions: residues of the query itself that are no columns, those right of the last included.
      num_left_out: rows of the text behind these that the caller did not want.
    """

    names: list[str]
    letters: NDArray[np.uint8]
    sparse: SparseDeletions
    query_insertions: int = 0
    num_left_out: int = 0

    @classmethod
    def dense(
        cls, names: list[str], letters: NDArray[np.uint8], deletions: NDArray[np.int32]
    ) -> ParsedAlignment:
        """Returns the alignment of arrays of equal shape, uint8 and int32 (num_rows, length)."""
        return cls(
            names=names,
            letters=letters,
            sparse=SparseDeletions.of(deletions),
            query_insertions=int(deletions[:1].sum()),
        )

    def take(self, rows: NDArray[np.int64]) -> ParsedAlignment:
        """Returns some rows; the first must be the query."""
        return ParsedAlignment(
            names=[self.names[row] for row in rows.tolist()],
            letters=self.letters[rows],
            sparse=self.sparse.take(rows),
            query_insertions=self.query_insertions,
        )

    @property
    def msa(self) -> NDArray[np.uint8]:
        """uint8 (num_rows, length) codes of `foldfeed.feature_store.format.alphabet`; a fresh array."""
        return alphabet.ENCODE[self.letters]

    @property
    def deletions(self) -> NDArray[np.int32]:
        """int32 (num_rows, length): all counts; a fresh array."""
        dense = np.zeros(self.letters.shape, dtype=np.int32)
        self.sparse.write(np.arange(len(dense)), dense)
        return dense


class AlignmentBuilder:
    """Collects blocks of rows. Belongs to one thread."""

    def __init__(self, length: int) -> None:
        """Starts an alignment of ``length`` columns."""
        self._length = length
        self._letters: list[NDArray[np.uint8]] = []
        self._room = 0
        self._per_row: list[NDArray[np.int32]] = []
        self._columns: list[NDArray[np.int32]] = []
        self._counts: list[NDArray[np.int32]] = []

    def add(self, letters: NDArray[np.uint8], cells: NDArray[np.int64]) -> None:
        """Adds rows.

        Args:
          letters: uint8 (rows, length).
          cells: increasing; of each inserted residue the cell right of it, ``row * length + column`` within
            these rows.
        """
        self._add_letters(letters)
        firsts = np.flatnonzero(np.diff(cells, prepend=-1))
        entries = cells[firsts]
        self._counts.append(np.diff(firsts, append=len(cells)).astype(np.int32))
        self._columns.append((entries % self._length).astype(np.int32))
        rows = np.bincount(entries // self._length, minlength=len(letters))
        self._per_row.append(rows.astype(np.int32))

    def finish(self, names: list[str], query_insertions: int = 0) -> ParsedAlignment:
        """Returns the alignment of all rows; the builder is empty afterwards."""
        sparse = SparseDeletions(
            per_row=_joined(self._per_row), columns=_joined(self._columns), counts=_joined(self._counts)
        )
        return ParsedAlignment(
            names=names, letters=self._all_letters(), sparse=sparse, query_insertions=query_insertions
        )

    def _add_letters(self, letters: NDArray[np.uint8]) -> None:
        while len(letters):
            if not self._room:
                # Not touched before it is filled, and given back to the system as soon as it goes; small
                # arrays stay in the process.
                self._room = max(1, _CHUNK_BYTES // self._length)
                self._letters.append(np.empty((self._room, self._length), dtype=np.uint8))
            chunk = self._letters[-1]
            taken = letters[: self._room]
            start = len(chunk) - self._room
            chunk[start : start + len(taken)] = taken
            self._room -= len(taken)
            letters = letters[len(taken) :]

    def _all_letters(self) -> NDArray[np.uint8]:
        last = self._letters.pop()
        last = last[: len(last) - self._room]
        if not self._letters:
            return last
        chunks = collections.deque([*self._letters, last])
        self._letters.clear()
        letters = np.empty((sum(map(len, chunks)), self._length), dtype=np.uint8)
        stop = 0
        # Each chunk goes once it is copied: all of them together would be the alignment once more.
        while chunks:
            chunk = chunks.popleft()
            start, stop = stop, stop + len(chunk)
            letters[start:stop] = chunk
        return letters


def _joined(pieces: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    whole = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    pieces.clear()
    return whole
