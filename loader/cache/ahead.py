"""Brings what samples need into memory before they are read, in their order, as far as memory goes.

A sample's plan says which bytes of which files it reads. `Ahead` asks for these while earlier samples are
read, with many requests in flight, and holds them in memory until the sample has been read. So the reading
itself never waits for the network, unless it is faster than that.

Invariants: no more than `CacheConfig.ahead_bytes` are held for samples that nobody reads yet (one sample may
always be brought); a sample that is read before its turn is brought at once, so nothing waits in a circle; an
error in here is met again by whoever reads.

Thread safe.
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from foldfeed.loader.cache.blocks import Block
from foldfeed.loader.cache.requests import RequestThreads
from foldfeed.loader.cache.tiers import Tiers

# Threads that plan samples: they wait for a part's metadata and indices at times, and plan otherwise.
_NUM_THREADS = 4


class _Brought:
    """A sample whose blocks are on their way or here."""

    def __init__(self) -> None:
        self.blocks: set[Block] = set()
        self.flights: list[Future[bytes]] = []
        # Set when both are complete.
        self.asked = threading.Event()
        self.read = False


class Ahead:
    """Samples that are brought into memory."""

    def __init__(
        self,
        tiers: Tiers,
        max_bytes: int,
        blocks_of: Callable[[int], tuple[set[Block], Callable[[], list[Future[bytes]]]]],
    ) -> None:
        """Starts nothing yet.

        Args:
          tiers: the cache.
          max_bytes: of blocks held for samples that nobody reads yet.
          blocks_of: returns the blocks that a sample reads, and what asks for them; it may raise.
        """
        self._tiers = tiers
        self._max_bytes = max_bytes
        self._blocks_of = blocks_of
        self._changed = threading.Condition()
        # In order; one that is read before its turn stays in the queue and leaves the set.
        self._wanted: collections.deque[int] = collections.deque()
        self._still_wanted: set[int] = set()
        self._samples: dict[int, _Brought] = {}
        self._waiting_bytes = 0
        self._reading: set[int] = set()
        self._closed = False
        self._num_working = 0
        self._threads = RequestThreads(_NUM_THREADS, "foldfeed-ahead")

    def ask(self, samples: Sequence[int]) -> None:
        """Says which samples will be read next, in that order."""
        if not self._max_bytes:
            return
        with self._changed:
            self._wanted.extend(samples)
            self._still_wanted.update(samples)
            missing = min(_NUM_THREADS, len(self._wanted)) - self._num_working
            self._num_working += max(0, missing)
            self._changed.notify_all()
        for _ in range(missing):
            self._threads.submit(self._work)

    @contextmanager
    def reading(self, sample: int) -> Iterator[None]:
        """Waits until a sample's blocks are in memory, or brings them, and holds them meanwhile."""
        with self._changed:
            brought = self._samples.get(sample)
            mine = brought is None
            if brought is None:
                brought = self._samples[sample] = _Brought()
                self._still_wanted.discard(sample)
            else:
                self._waiting_bytes -= self._size(brought)
            brought.read = True
            self._reading.add(sample)
            self._changed.notify_all()
        if mine:
            self._bring(sample, brought)
        brought.asked.wait()
        concurrent.futures.wait(brought.flights)
        try:
            yield
        finally:
            self._tiers.memory.let_go(brought.blocks, sample + 1)
            with self._changed:
                del self._samples[sample]
                self._reading.discard(sample)
                now = min(self._reading, default=sample + 1)
                self._changed.notify_all()
            self._tiers.passed(now)

    def forget(self, sample: int) -> None:
        """Lets go of a sample that nobody will read."""
        with self._changed:
            self._still_wanted.discard(sample)
            is_brought = sample in self._samples
        if is_brought:
            with self.reading(sample):
                pass

    def stop(self) -> None:
        """Brings nothing more."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads."""
        self.stop()
        self._threads.close()

    def _work(self) -> None:
        """Brings samples as long as any are wanted and there is room."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._wanted or self._has_room())
                if self._closed or not self._wanted:
                    self._num_working -= 1
                    return
                sample = self._wanted.popleft()
                if sample not in self._still_wanted:
                    continue
                self._still_wanted.discard(sample)
                brought = self._samples[sample] = _Brought()
            self._bring(sample, brought)

    def _has_room(self) -> bool:
        return self._waiting_bytes < self._max_bytes or not self._waiting_bytes

    def _bring(self, sample: int, brought: _Brought) -> None:
        try:
            blocks, ask = self._blocks_of(sample)
            self._tiers.memory.hold(blocks)
            with self._changed:
                brought.blocks = blocks
                if not brought.read:
                    self._waiting_bytes += self._size(brought)
            brought.flights = ask()
        except Exception:  # noqa: BLE001  whoever reads the sample meets it again and says so
            pass
        finally:
            brought.asked.set()

    def _size(self, brought: _Brought) -> int:
        return len(brought.blocks) * self._tiers.block_bytes
