"""Which block goes first: the one whose next use is farthest away (Belady's rule).

The loader knows the order of its samples, so it knows when a block may be read next. A block of which nothing
is known (of another store, or behind the horizon of a weighted order) counts as farther than all that are
known; of several such the one that was used longest ago goes first.

`Evictor` keeps the names, their sizes and their next use, and no bytes. It is told where the reader stands; a
next use that has passed (a crop left the block out) is asked for again, so that no block stays for the sake
of a past one. Next uses are asked for when something has to go and not before, many at once: where everything
fits nobody asks. Not thread safe: its tier holds a lock.

Source: L. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5,
1966; R. Mattson et al., "Evaluation techniques for storage hierarchies", ibid. 9, 1970.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from foldfeed.loader.cache.blocks import Block

Name = TypeVar("Name")
# A next use that nobody knows.
UNKNOWN = 2**63 - 1
# For some blocks the first sample from a given one on that may read each, or `UNKNOWN`.
NextUses: TypeAlias = "Callable[[Sequence[Block], int], Sequence[int]]"


def unknown_uses(blocks: Sequence[Block], now: int) -> list[int]:
    """Knows of no next use: what was used longest ago goes first."""
    return [UNKNOWN] * len(blocks)


class Evictor(Generic[Name]):
    """Names with sizes, in the order in which they go."""

    def __init__(self, next_uses: Callable[[Sequence[Name], int], Sequence[int]]) -> None:
        """Begins empty.

        Args:
          next_uses: returns for some names the first sample from a given one on that may read each, or
            `UNKNOWN`.
        """
        self.num_bytes = 0
        self._next_uses = next_uses
        # Size, next use (None while nobody asked for it) and when it was last used.
        self._entries: dict[Name, tuple[int, int | None, int]] = {}
        # Those without a next use, and the first sample that may be it.
        self._open: dict[Name, int] = {}
        self._turn = itertools.count()
        # The farthest first, and the soonest first. Items that are out of date are skipped.
        self._far: list[tuple[int, int, Name]] = []
        self._soon: list[tuple[int, int, Name]] = []
        self._now = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: Name) -> bool:
        return name in self._entries

    def used(self, name: Name, size: int, now: int) -> None:
        """Takes a name in, or notes that it was used; it may be used again by sample ``now`` or later."""
        self.removed(name)
        self._entries[name] = (size, None, next(self._turn))
        self._open[name] = now
        self.num_bytes += size

    def removed(self, name: Name) -> int:
        """Forgets a name; returns its size, 0 when it was not there."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return 0
        self._open.pop(name, None)
        self.num_bytes -= entry[0]
        return entry[0]

    def passed(self, now: int) -> None:
        """Says that samples before ``now`` have been read."""
        self._now = now

    def farthest(self) -> tuple[Name, int] | None:
        """Returns the name that goes next and its next use; None when there is none."""
        while self._soon and self._soon[0][0] < self._now:
            use, turn, name = heapq.heappop(self._soon)
            if self._entries.get(name, (0, None, -1))[1:] == (use, turn):
                self._open[name] = self._now
        if self._open:
            self._ask()
        while self._far:
            use, turn, name = self._far[0]
            if self._entries.get(name, (0, None, -1))[1:] == (-use, turn):
                return name, -use
            heapq.heappop(self._far)
        return None

    def _ask(self) -> None:
        """Asks for the next use of all names that have none, or a past one."""
        groups: dict[int, list[Name]] = {}
        for name, after in self._open.items():
            groups.setdefault(max(after, self._now), []).append(name)
        self._open.clear()
        for now, names in groups.items():
            for name, use in zip(names, self._next_uses(names, now), strict=True):
                size, _, turn = self._entries[name]
                self._entries[name] = (size, use, turn)
                heapq.heappush(self._far, (-use, turn, name))
                if use != UNKNOWN:
                    heapq.heappush(self._soon, (use, turn, name))
        if len(self._far) + len(self._soon) > 64 + 6 * len(self._entries):
            # Mostly items that are out of date.
            known = [(use, turn, name) for name, (_, use, turn) in self._entries.items() if use is not None]
            self._far = [(-use, turn, name) for use, turn, name in known]
            self._soon = [item for item in known if item[0] != UNKNOWN]
            heapq.heapify(self._far)
            heapq.heapify(self._soon)
