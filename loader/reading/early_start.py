"""Slow samples begin first: what is known to take long must not be what everybody waits for at the end.

`SlowFirst` hands tasks to threads. Of the tasks that wait, those of the earliest window of `WINDOW` go first,
and within a window the dearest. So a task is overtaken by less than a window of later ones, however dear
these are; whoever collects the results in order sees no difference but in time.

Thread safe.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

WINDOW = 16


class SlowFirst:
    """Tasks on the threads of a pool."""

    def __init__(self, threads: ThreadPoolExecutor, window: int = WINDOW) -> None:
        self._threads = threads
        self._window = window
        self._lock = threading.Lock()
        self._count = itertools.count()
        self._waiting: list[tuple[int, float, int, Callable[[], object]]] = []

    def submit(self, cost: float, task: Callable[[], object]) -> None:
        """Runs a task, which must not raise, when it is its turn.

        Args:
          cost: what it is expected to take, in any unit.
          task: what to run.
        """
        with self._lock:
            number = next(self._count)
            heapq.heappush(self._waiting, (number // self._window, -cost, number, task))
        # One turn for each task; whose turn it is shows when a thread is free.
        self._threads.submit(self._take_turn)

    def _take_turn(self) -> None:
        with self._lock:
            task = heapq.heappop(self._waiting)[3]
        task()
