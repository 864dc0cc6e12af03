"""What comes out of reading processes: pieces of memory with some samples each, by the groups asked for.

A `Group` is what was asked for together, and is waited for. A `Piece` is what one message of a reading
process tells of: usually a whole group. Nothing is made of its samples until somebody asks, so whoever only
copies the bytes on has one piece of work for all of them.

Owns no process and no memory: `reading.reading` does. Thread safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from foldfeed.loader.notes import MISSING, PieceNote
from foldfeed.loader.reading.fetch import SampleArrays
from foldfeed.loader.reading.packed import ROW_BYTES, padded, rows_in, sample_at, shift
from foldfeed.loader.reading.slots import Memory
from foldfeed.loader.unreadable import Substitution


class Piece:
    """Samples of a group that lie together in memory of a reading process, until all were given back.

    Attributes:
      places: of its samples, rows that are there.
      numbers: of those samples, in the same order.
      read_s: seconds that planning and reading took, likewise.
      num_bytes: of the arrays of all its samples.
      substitution: which record took the place of which, of its only sample; None where none did.
    """

    def __init__(
        self,
        note: PieceNote,
        memory: Memory,
        give_back: Callable[[], None],
        substitution: Substitution | None = None,
    ) -> None:
        """Takes memory that is not written to until ``give_back`` is called, which happens once."""
        self.places = [place for place, number in enumerate(note.numbers) if number != MISSING]
        self.numbers, self.read_s = note.numbers, note.read_s
        if len(self.places) < len(note.numbers):
            self.numbers = [note.numbers[place] for place in self.places]
            self.read_s = [note.read_s[place] for place in self.places]
        self.num_bytes = note.num_bytes
        self.substitution = substitution
        self._num_rows = len(note.numbers)
        self._memory = memory
        self._start, self._stop = note.start, note.start + note.size
        self._give_back = give_back
        self._left = len(self.places)
        self._lock = threading.Lock()

    def packed(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Returns rows, a copy, and bytes, a view, as `features.step_block.StepBlock` takes them."""
        rows = rows_in(self._memory, self._start, self._num_rows)[self.places]
        behind = padded(ROW_BYTES * self._num_rows)
        shift(rows, -behind)
        whole = np.frombuffer(self._memory, dtype=np.uint8)
        return rows, whole[self._start + behind : self._stop]

    def sample(self, number: int) -> SampleArrays:
        """Returns a sample as views of the memory."""
        rows = rows_in(self._memory, self._start, self._num_rows)
        return sample_at(self._memory, rows[self.places[self.numbers.index(number)]], self._start)

    def give_back(self, num_samples: int = 1) -> None:
        """Says that so many of its samples are not needed any more."""
        with self._lock:
            self._left -= num_samples
            is_last = not self._left
        assert self._left >= 0, self.numbers
        if is_last:
            self._give_back()


class Group:
    """Samples that were asked for together.

    Attributes:
      numbers: of them, in the order asked for.
    """

    def __init__(self, numbers: Sequence[int], in_need: Callable[[], AbstractContextManager[None]]) -> None:
        """Nothing is there yet.

        Args:
          numbers: of the samples.
          in_need: a context in which somebody waits for what is missing.
        """
        self.numbers = numbers
        self._in_need = in_need
        self._changed = threading.Condition()
        self._found: dict[int, Piece | Exception] = {}
        self._fresh: list[Piece] = []

    def put(self, piece: Piece) -> None:
        """Takes some of its samples."""
        with self._changed:
            self._found.update(dict.fromkeys(piece.numbers, piece))
            self._fresh.append(piece)
            self._changed.notify_all()

    def fail(self, number: int, error: Exception) -> None:
        """Takes what to raise in place of a sample."""
        with self._changed:
            self._found[number] = error
            self._changed.notify_all()

    def piece_of(self, number: int) -> Piece:
        """Returns the piece that a sample is in; waits for it.

        Raises:
          Exception: what `fail` took.
        """
        self._wait(lambda: number in self._found)
        found = self._found[number]
        if isinstance(found, Exception):
            raise found
        return found

    def pieces(self) -> Iterator[Piece]:
        """Yields its pieces as they come.

        Raises:
          Exception: what `fail` took for the first of its samples that failed; after all pieces.
        """
        is_whole = False
        while not is_whole:
            self._wait(lambda: self._fresh or len(self._found) == len(self.numbers))
            with self._changed:
                fresh, self._fresh = self._fresh, []
                is_whole = len(self._found) == len(self.numbers)
            yield from fresh
        for number in self.numbers:
            if isinstance(found := self._found[number], Exception):
                raise found

    def _wait(self, is_there: Callable[[], object]) -> None:
        with self._changed:
            if is_there():
                return
        with self._in_need(), self._changed:
            while not is_there():
                self._changed.wait()
