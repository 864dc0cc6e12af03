"""Which block goes first: the one whose next use is farthest away (Belady's rule).

The loader knows the order of its samples, so it knows when a block may be read next. A block of which nothing
is known (of another store, or behind the horizon of a weighted order) counts as farther than all that are
known; of several such the one that was used longest ago goes first.

`Evictor` keeps the names, their sizes and their next use, and no bytes. It is told where the reader stands; a
next use that has passed (a crop left the block out) is asked for again, so that no block stays for the sake
of a past one. Not thread safe: its tier holds a lock.

Source: L. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5,
1966; R. Mattson et al., "Evaluation techniques for storage hierarchies", ibid. 9, 1970.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

Name = TypeVar("Name")
# A next use that nobody knows.
UNKNOWN = 2**63 - 1


class Evictor(Generic[Name]):
    """Names with sizes, in the order in which they go."""

    def __init__(self, next_use: Callable[[Name, int], int]) -> None:
        """Begins empty.

        Args:
          next_use: returns the first sample from a given one on that may read a name, or `UNKNOWN`.
        """
        self.num_bytes = 0
        self._next_use = next_use
        # Size, next use, and when it was last used.
        self._entries: dict[Name, tuple[int, int, int]] = {}
        self._turn = itertools.count()
        # The farthest first, and the soonest first. Entries that are out of date are skipped.
        self._far: list[tuple[int, int, int, Name]] = []
        self._soon: list[tuple[int, int, Name]] = []
        self._ties = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: Name) -> bool:
        return name in self._entries

    def size(self, name: Name) -> int:
        """Returns the size of a name, 0 when it is not there."""
        return self._entries.get(name, (0, 0, 0))[0]

    def used(self, name: Name, size: int, now: int) -> None:
        """Takes a name in, or notes that it was read by sample ``now`` or is about to be."""
        self._forget(name)
        entry = (size, self._next_use(name, now), next(self._turn))
        self._entries[name] = entry
        self.num_bytes += size
        self._push(name, entry)

    def removed(self, name: Name) -> int:
        """Forgets a name; returns its size, 0 when it was not there."""
        return self._forget(name)

    def passed(self, now: int) -> None:
        """Says that samples before ``now`` have been read: uses that lie before it are asked for again."""
        while self._soon and self._soon[0][0] < now:
            use, _, name = heapq.heappop(self._soon)
            entry = self._entries.get(name)
            if entry is not None and entry[1] == use:
                fresh = (entry[0], self._next_use(name, now), entry[2])
                self._entries[name] = fresh
                self._push(name, fresh)

    def farthest(self) -> tuple[Name, int] | None:
        """Returns the name that goes next and its next use; None when there is none."""
        while self._far:
            use, turn, _, name = self._far[0]
            entry = self._entries.get(name)
            if entry is not None and (-entry[1], entry[2]) == (use, turn):
                return name, entry[1]
            heapq.heappop(self._far)
        return None

    def _forget(self, name: Name) -> int:
        entry = self._entries.pop(name, None)
        if entry is None:
            return 0
        self.num_bytes -= entry[0]
        return entry[0]

    def _push(self, name: Name, entry: tuple[int, int, int]) -> None:
        if len(self._far) + len(self._soon) > 64 + 6 * len(self._entries):
            # Mostly entries that are out of date.
            self._far = [self._far_item(name, one) for name, one in self._entries.items()]
            self._soon = [
                self._soon_item(name, one) for name, one in self._entries.items() if one[1] != UNKNOWN
            ]
            heapq.heapify(self._far)
            heapq.heapify(self._soon)
            return
        heapq.heappush(self._far, self._far_item(name, entry))
        if entry[1] != UNKNOWN:
            heapq.heappush(self._soon, self._soon_item(name, entry))

    def _far_item(self, name: Name, entry: tuple[int, int, int]) -> tuple[int, int, int, Name]:
        return -entry[1], entry[2], next(self._ties), name

    def _soon_item(self, name: Name, entry: tuple[int, int, int]) -> tuple[int, int, Name]:
        return entry[1], next(self._ties), name
