"""Blocks in this process's memory: bounded bytes, the one whose next use is farthest away goes first.

A block that is asked for by a sample that is being read or brought ahead is held (`hold`) and stays until the
last of these lets go, whatever its order says: what was brought ahead must not be thrown out for what is
brought further ahead. Held blocks count, too: the bound holds whatever is held.

Thread safe.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from foldfeed.loader.cache.blocks import Block
from foldfeed.loader.cache.eviction import Evictor, NextUses


class MemoryTier:
    """Blocks by name."""

    def __init__(self, max_bytes: int, next_uses: NextUses) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._data: dict[Block, bytes] = {}
        # Those that may go; held ones are not among them.
        self._evictor: Evictor[Block] = Evictor(next_uses)
        self._held: Counter[Block] = Counter()
        self._num_bytes = 0
        self._now = 0
        self.evictions = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks here."""
        return self._num_bytes

    def get(self, block: Block) -> bytes | None:
        """Returns a block, None when it is not here."""
        with self._lock:
            data = self._data.get(block)
            if data is not None and block in self._evictor:
                self._evictor.used(block, len(data), self._now)
            return data

    def has(self, block: Block) -> bool:
        """Returns whether a block is here; that is no use of it."""
        return block in self._data

    def put(self, block: Block, data: bytes) -> None:
        """Takes a block; others go for it, or it does not stay when it is the one that goes first."""
        with self._lock:
            old = self._data.get(block)
            self._num_bytes += len(data) - (0 if old is None else len(old))
            self._data[block] = data
            if block not in self._held:
                self._evictor.used(block, len(data), self._now)
            self._shrink()
            if self._num_bytes > self._max_bytes:
                # All others are held. Whoever wants this one has it in hand.
                self._remove(block)

    def drop(self, block: Block) -> None:
        """Forgets a block."""
        with self._lock:
            self._remove(block)

    def hold(self, blocks: Iterable[Block]) -> None:
        """Keeps blocks, here or still to come, until `let_go`; holds are counted."""
        with self._lock:
            for block in blocks:
                self._held[block] += 1
                self._evictor.removed(block)

    def let_go(self, blocks: Iterable[Block], now: int) -> None:
        """Ends one hold of each block; its next use is by sample ``now`` at the earliest."""
        with self._lock:
            for block in blocks:
                self._held[block] -= 1
                if not self._held[block]:
                    del self._held[block]
                    data = self._data.get(block)
                    if data is not None:
                        self._evictor.used(block, len(data), max(now, self._now))
            self._shrink()

    def passed(self, now: int) -> None:
        """Says that samples before ``now`` have been read."""
        with self._lock:
            self._now = max(now, self._now)
            self._evictor.passed(self._now)

    def clear(self) -> None:
        """Forgets everything; holds stay."""
        with self._lock:
            for block in list(self._data):
                self._remove(block)

    def _shrink(self) -> None:
        while self._num_bytes > self._max_bytes:
            found = self._evictor.farthest()
            if found is None:
                return
            self._remove(found[0])
            self.evictions += 1

    def _remove(self, block: Block) -> None:
        data = self._data.pop(block, None)
        if data is not None:
            self._num_bytes -= len(data)
        self._evictor.removed(block)
