"""Room for pieces in one stretch of memory, taken in order and given back in any order.

`RingSpace` is the arithmetic and the waiting; the memory is somebody else's. A piece is taken behind the one
before, or at the beginning where the end has no room; it can be taken again once it and all earlier ones were
given back. So memory never fragments, whatever sizes come, and the oldest piece is never without room.

Thread safe.
"""

from __future__ import annotations

import collections
import threading

ALIGNMENT = 64


class RingClosedError(Exception):
    """The ring was closed while somebody waited for room; not an error of a user."""


class RingSpace:
    """Which stretches of ``capacity`` bytes are taken."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._changed = threading.Condition()
        # Start, end and whether it was given back, oldest first. Stretches that are skipped at the end count.
        self._pieces: collections.deque[list[int]] = collections.deque()
        self._by_start: dict[int, list[int]] = {}
        self._head = 0
        self._closed = False

    def take(self, size: int) -> int:
        """Returns where a piece of ``size`` bytes begins, a multiple of `ALIGNMENT`; waits for room.

        Raises:
          RingClosedError: the ring was closed.
          ValueError: a piece of no size, or one that never has room.
        """
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if not 0 < size <= self.capacity:
            raise ValueError(f"a piece of {size} bytes in a ring of {self.capacity}")
        with self._changed:
            while True:
                if self._closed:
                    raise RingClosedError
                start = self._find(size)
                if start is not None:
                    piece = [start, start + size, 0]
                    self._pieces.append(piece)
                    self._by_start[start] = piece
                    self._head = start + size
                    return start
                self._changed.wait()

    def give_back(self, start: int) -> None:
        """Says that the piece that begins there is not used any more."""
        with self._changed:
            self._by_start.pop(start)[2] = 1
            while self._pieces and self._pieces[0][2]:
                self._pieces.popleft()
            if not self._pieces:
                self._head = 0
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _find(self, size: int) -> int | None:
        if not self._pieces:
            return 0
        tail = self._pieces[0][0]
        if self._head > tail:
            if self.capacity - self._head >= size:
                return self._head
            if tail >= size:
                # The rest of the end stays empty until what lies before it was given back.
                if self._head < self.capacity:
                    self._pieces.append([self._head, self.capacity, 1])
                return 0
            return None
        return self._head if tail - self._head >= size else None
